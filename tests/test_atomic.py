"""Files that are written whole or not at all."""

import pytest

from psbn_mmdet.atomic import replacing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'page.html'
    path.write_text('old')
    with pytest.raises(TypeError), replacing(path) as part:
        part.write_text('ha') + 'lf'
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / 'a' / 'b' / 'page.html'
    for text in ('old', 'new'):
        with replacing(path) as part:
            part.write_text(text)
    assert path.read_text() == 'new'
    assert list(path.parent.iterdir()) == [path]
