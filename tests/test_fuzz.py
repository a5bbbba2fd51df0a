"""The short form of fuzz.py: every reader and parser gets a little spoilt input; `python tests/fuzz.py` goes on."""

import fuzz


def test_no_spoilt_input_crashes(tmp_path):
    counts = fuzz.fuzz(4, 0, tmp_path / "crashes")
    assert all(count["inputs"] for count in counts.values())
    assert not any(count["crashes"] for count in counts.values()), sorted((tmp_path / "crashes").iterdir())
