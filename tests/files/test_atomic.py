"""Files are written whole or not at all: a full disk, Ctrl-C and a kill leave what was there, and nothing beside it."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file, save_file
from vae_helpers import assert_one_sentence, random_latent

from comfyui_patchconv.cli.demo import DemoSettings, Result, plot
from comfyui_patchconv.files import atomic
from comfyui_patchconv.files.atomic import (
    check_folder_writable,
    check_no_input,
    check_writable,
    copy_whole,
    write_whole,
)
from comfyui_patchconv.files.images import save_image
from comfyui_patchconv.files.latents import save_latent
from comfyui_patchconv.files.tensors import read_header, save_tensors
from comfyui_patchconv.pixel_models.training.loop import add_losses

OLD = b"step,loss\r\n1,0.5\r\n"


def _figure(path: Path) -> None:
    plot({"plain": Result(1, 1.0, [(0.5, 1)], torch.zeros(3, 8, 8).numpy())}, DemoSettings(), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "image": lambda path: save_image(path, torch.rand(3, 64, 64)),
    "latent": lambda path: save_latent(path, random_latent()),
    "tensors": lambda path: save_tensors(path, {"a": torch.zeros(1000)}),
    "checkpoint": lambda path: write_whole(path, lambda file: torch.save({"a": torch.zeros(1000)}, file)),
    "losses": lambda path: add_losses(path, [(step, 1 / 3) for step in range(2, 100)]),
    "figure": _figure,
    "copy": lambda path: copy_whole(Path(__file__), path),
}
"""All that write a file, of any kind."""

EVERY = pytest.mark.parametrize("save", WRITERS.values(), ids=WRITERS.keys())


@pytest.fixture(params=["nameless", "links nothing", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system can do: files without names, which can be linked or not; none of that."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if request.param == "links nothing":
        monkeypatch.setattr(os, "link", refused)
    if request.param == "named":
        monkeypatch.setattr(atomic, "_nameless", lambda folder: None)
    return request.param


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can become larger than `size` bytes within the block."""
    resource: Any = pytest.importorskip("resource", reason="this system has no limit to the size of a process's files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@EVERY
def test_a_file_is_replaced(tmp_path: Path, way: str, save: Callable[[Path], object]) -> None:
    path, fresh = tmp_path / "old", tmp_path / "new"
    path.write_bytes(OLD)
    path.chmod(0o640)
    before = stat.S_IMODE(path.stat().st_mode)
    save(path)
    save(fresh)
    assert path.read_bytes() != OLD
    if hasattr(os, "fchmod"):
        assert stat.S_IMODE(path.stat().st_mode) == before
    (tmp_path / "usual").write_bytes(b"")
    assert fresh.stat().st_mode == (tmp_path / "usual").stat().st_mode
    (tmp_path / "usual").unlink()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["new", "old"]


@EVERY
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, way: str, save: Callable[[Path], object]) -> None:
    path = tmp_path / "old"
    path.write_bytes(OLD)
    with full_disk(200), pytest.raises(OSError, match="cannot be written") as caught:
        save(path)
    assert_one_sentence(caught.value, path)
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_only_when_the_file_is_synced_leaves_the_old_file(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "old"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_latent(path, random_latent())
    assert_one_sentence(caught.value, path)
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="this system opens no folder, and needs none to be synced")
def test_the_file_and_then_its_folder_are_synced(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced, sync = tmp_path / "new", list[tuple[bool, bool]](), os.fsync

    def watched(number: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(number).st_mode), path.exists()))
        sync(number)

    monkeypatch.setattr(os, "fsync", watched)
    write_whole(path, lambda file: file.write(b"new"))
    assert synced[0] == (False, False)
    assert synced[-1] == (True, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_ends_early_leaves_the_old_file(tmp_path: Path, way: str, error: type[BaseException]) -> None:
    def broken(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        raise error

    path = tmp_path / "old"
    path.write_bytes(OLD)
    with pytest.raises(error):
        write_whole(path, broken)
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_a_kill_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, number: str) -> None:
    if atomic._nameless(tmp_path) is None:
        pytest.skip("no files without names here")
    sent = signal.Signals[number]

    def killed(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), sent)

    path = tmp_path / "old"
    path.write_bytes(OLD)
    child = os.fork()
    if not child:
        write_whole(path, killed)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == sent
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path, way: str) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.write_bytes(OLD)
    link.symlink_to(target)
    write_whole(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["file", "link", "there"]


def _written(path: Path) -> None:
    write_whole(path, lambda file: file.write(b"new"))


BEFORE_AND_AFTER = pytest.mark.parametrize("refused", [check_writable, _written])
"""What cannot be written is known before there is anything to write."""


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str, refused: Callable[[Path], None]) -> None:
    path = tmp_path / "there"
    if kind == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes with a name in a folder")
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(OSError, match="name of a file") as caught:
        refused(path)
    assert_one_sentence(caught.value, path)


@BEFORE_AND_AFTER
def test_a_link_into_a_folder_that_is_not_there(tmp_path: Path, refused: Callable[[Path], None]) -> None:
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "missing" / "file")
    with pytest.raises(OSError, match="missing does not exist") as caught:
        refused(path)
    assert_one_sentence(caught.value, path)


@BEFORE_AND_AFTER
def test_a_folder_in_which_nothing_can_be_written(unwritable: Path, refused: Callable[[Path], None]) -> None:
    with pytest.raises(OSError, match="cannot be written") as caught:
        refused(unwritable / "new")
    assert_one_sentence(caught.value, unwritable)
    with pytest.raises(OSError, match="nothing can be written") as caught:
        check_folder_writable(unwritable)
    assert_one_sentence(caught.value, unwritable)


def test_looking_leaves_nothing(tmp_path: Path, way: str) -> None:
    path = tmp_path / "there"
    check_writable(path)
    path.write_bytes(OLD)
    check_writable(path)
    check_folder_writable(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == OLD


@BEFORE_AND_AFTER
def test_a_file_that_is_read_only_stays(
    tmp_path: Path, refused: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "there"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, which may all
    with pytest.raises(OSError, match="read-only") as caught:
        refused(path)
    assert_one_sentence(caught.value, path)
    assert path.read_bytes() == OLD


def test_tensors_are_what_safetensors_writes(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {f"{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"none": torch.zeros(0, 4), "a number": torch.tensor(3.0), 'a "name"\n': torch.ones(3, 2).T}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_tensors(ours, tensors, {"key": "value"})
    save_file({name: value.contiguous() for name, value in tensors.items()}, theirs, {"key": "value"})
    assert read_header(ours) == read_header(theirs)
    loaded = load_file(ours)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert ours.stat().st_size == theirs.stat().st_size


@pytest.mark.parametrize("kind", ["same", "by another path", "link", "hard link"])
def test_an_input_is_no_output(tmp_path: Path, kind: str) -> None:
    read, output = tmp_path / "in", tmp_path / "out"
    read.write_bytes(OLD)
    if kind == "link":
        output.symlink_to(read)
    elif kind == "hard link":
        output.hardlink_to(read)
    else:
        output = read if kind == "same" else tmp_path / ".." / tmp_path.name / "in"
    with pytest.raises(ValueError, match="an input"):
        check_no_input(output, [None, tmp_path / "missing", read])
    check_no_input(tmp_path / "other", [read])
