"""Files that are written whole or not at all."""

import os

import pytest

from psbn_mmdet.records.atomic import WriteError, replacing


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


def test_links_are_followed(tmp_path):
    for target in ('there.html', 'not_yet.html'):
        path, link = tmp_path / target, tmp_path / f'link_to_{target}'
        link.symlink_to(path)
        with replacing(link) as part:
            part.write_text('new')
        assert link.is_symlink() and path.read_text() == 'new'


def test_what_is_no_regular_file_is_left_as_it_is(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', tmp_path):
        with pytest.raises(WriteError, match='is no regular file'), replacing(path):
            pass
    assert (tmp_path / 'pipe').is_fifo()
