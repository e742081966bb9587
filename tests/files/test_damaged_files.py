"""What a damaged, wrong or hostile file leads to: one clear sentence, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vae_helpers import assert_one_sentence, ldm_state, small_vae, write

from comfyui_patchconv.files.images import load_image
from comfyui_patchconv.files.latents import load_latent
from comfyui_patchconv.files.tensors import unpickled
from comfyui_patchconv.files.vae import load_vae


def state_in(layout: str) -> dict[str, Tensor]:
    vae = small_vae()
    return ldm_state(vae) if layout == "ldm" else vae.state_dict()


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start: Any = 0, stop: Any = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DAMAGED = {
    "empty": b"",
    "shorter than a length": b"1234567",
    "a web page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "header beyond the file": with_header({"a": tensor()}, b"0000", length=5000),
    "header of the largest length": with_header({}, length=2**64 - 1),
    "no header": with_header(b""),
    "not JSON": with_header(b"{'a': 1}"),
    "not UTF-8": with_header(b'{"\xff\xfe": 1}'),
    "nested without end": with_header(b"[" * 100_000),
    "a list": with_header([tensor()], b"0000"),
    "a number": with_header(3),
    "an entry that is no entry": with_header({"a": 3}),
    "an entry without a type": with_header({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"0000"),
    "offsets outside": with_header({"a": tensor(0, 4000, [1000])}, b"0000"),
    "offsets beyond any file": with_header({"a": tensor(0, 2**70, [2**68])}, b"0000"),
    "negative offsets": with_header({"a": tensor(-4, 0)}, b"0000"),
    "offsets the wrong way round": with_header({"a": tensor(4, 0)}, b"0000"),
    "fractional offsets": with_header({"a": tensor(0, 4.0)}, b"0000"),
    "three offsets": with_header({"a": {**tensor(), "data_offsets": [0, 4, 8]}}, b"00000000"),
    "overlapping": with_header({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"0" * 12),
    "a gap": with_header({"a": tensor(0, 4), "b": tensor(8, 12)}, b"0" * 12),
    "data that no tensor has": with_header({"a": tensor()}, b"0" * 64),
    "a shape that is not its size": with_header({"a": tensor(0, 4, [3])}, b"0000"),
    "a shape without end": with_header({"a": tensor(0, 4, [1] * 1000)}, b"0000"),
    "a negative shape": with_header({"a": tensor(0, 4, [-1, -1])}, b"0000"),
    "a shape that is no list": with_header({"a": tensor(0, 4, 1)}, b"0000"),
    "an unknown type": with_header({"a\n\x1b[2J": tensor(dtype="F3\n2")}, b"0000"),
    "a type that is no text": with_header({"a": tensor(dtype=["F32"])}, b"0000"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("load", [load_vae, load_latent])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, load: Callable[[Path], Any], content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert_one_sentence(caught.value, path)


def test_a_vae_cut_short_anywhere_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", small_vae().state_dict())
    size = path.stat().st_size
    for length in (size - 1, size // 2, 4000, 8):
        os.truncate(path, length)
        with pytest.raises(ValueError) as caught:
            load_vae(path)
        assert_one_sentence(caught.value, path)


@pytest.mark.parametrize("load", [load_vae, load_latent, load_image])
def test_a_missing_file_and_a_folder_are_named(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        load(tmp_path / "none.ckpt")
    assert_one_sentence(missing.value, tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="folder") as folder:
        load(tmp_path)
    assert_one_sentence(folder.value, tmp_path)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_vae_that_lacks_a_tensor_is_refused_whichever_it_is(tmp_path: Path, layout: str) -> None:
    state, path = state_in(layout), tmp_path / "vae.safetensors"
    for lacking in list(state)[::7]:  # weights and biases in turn, of each level
        write(path, {name: value for name, value in state.items() if name != lacking})
        with pytest.raises(ValueError) as caught:
            load_vae(path)
        assert_one_sentence(caught.value, path)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_vae_with_a_wrong_tensor_is_refused_whichever_it_is(tmp_path: Path, layout: str) -> None:
    state, path = state_in(layout), tmp_path / "vae.safetensors"
    changes = cycle([lambda v: v[:1], lambda v: v[None], lambda v: v.int(), lambda v: v[:0]])
    for name, change in list(zip(state, changes))[::7]:
        write(path, {**state, name: change(state[name])})
        with pytest.raises(ValueError) as caught:
            load_vae(path)
        assert_one_sentence(caught.value, path)


def test_a_vae_with_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", {**state_in("ldm"), "decoder.up.0.attn.0.q.weight": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"decoder.up.0.attn.0.q.weight") as caught:
        load_vae(path)
    assert_one_sentence(caught.value, path)


@pytest.mark.parametrize(
    "names", [["unet.weight"], [], ["decoder.conv_in.weight"], ["encoder.conv_in.weight", "decoder.conv_in.weight"]]
)
def test_a_file_without_a_vae_is_refused(tmp_path: Path, names: list[str]) -> None:
    path = write(tmp_path / "x.safetensors", {name: torch.zeros(4, 4, 3, 3) for name in names})
    with pytest.raises(ValueError, match="VAE") as caught:
        load_vae(path)
    assert_one_sentence(caught.value, path)


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_cannot_run_code(tmp_path: Path, save: Callable[[Any, Path], Any], trust: bool) -> None:
    path, mark = tmp_path / "x.ckpt", tmp_path / "mark"
    save({"decoder.conv_in.weight": torch.zeros(1), "attack": Attack(mark)}, path)
    with pytest.raises(ValueError, match="safe") as caught:
        load_vae(path, trust=trust)
    assert_one_sentence(caught.value, path)
    assert not mark.exists()


def test_the_old_form_of_torch_save_is_refused_whatever_its_end_says(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"decoder.conv_in.weight": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    for end in (b"", b"PK\x05\x06" + bytes(18)):  # a zip file says at its end that it is one
        path.write_bytes(path.read_bytes() + end)
        with pytest.raises(ValueError, match=r"since torch 1.6") as caught:
            load_vae(path, trust=True)
        assert_one_sentence(caught.value, path)


@pytest.mark.parametrize(
    ("version", "safe"),
    [("2.1.2+cu121", False), ("2.5.1", False), ("2.6.0+cpu", True), ("2.10.0a0+git12", True), ("3.0.0", True)],
)
def test_pickles_are_for_a_torch_that_reads_them_safely(
    tmp_path: Path, version: str, safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.ones(2)}, path)
    monkeypatch.setattr(torch, "__version__", version)
    assert unpickled(path, trust=True)["a"].tolist() == [1, 1]
    if safe:
        assert unpickled(path)["a"].tolist() == [1, 1]
        return
    for load in (unpickled, load_vae):
        with pytest.raises(ValueError, match=r"CVE-2025-32434.*safetensors.*--trust") as caught:
            load(path)
        assert_one_sentence(caught.value, path)


PICKLES: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a pickle",
    "a stack that is empty": b"\x80\x02.",
    "opcodes at random": bytes(range(256)),
    "a zip with nothing in it": b"PK\x05\x06" + bytes(18),
    "no dictionary": pickle.dumps([1, 2], protocol=2),
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES.keys())
def test_a_damaged_pickle_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_vae(tmp_path / "x.pt")
    assert_one_sentence(caught.value, tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"latent_tensor": torch.full((1, 4, 2, 2), torch.nan)}, "NaN"),
        ({"samples": torch.full((1, 4, 2, 2), torch.inf)}, "infinity"),
        ({"samples": torch.zeros(4, 2, dtype=torch.float32)}, "shape"),
        ({"samples": torch.zeros(1, 16, 5, 8, 8)}, "shape"),
        ({"samples": torch.zeros(1, 4, 0, 8)}, "shape"),
        ({"samples": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "I64"),
        ({"a\n": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "I64"),
        ({"a": torch.zeros(1, 4, 8, 8), "b": torch.zeros(1)}, "a, b"),
        ({"latent_format_version_0": torch.zeros(0)}, "no tensors"),
    ],
)
def test_what_is_no_latent_is_refused(tmp_path: Path, tensors: dict[str, Tensor], word: str) -> None:
    path = write(tmp_path / "x.latent", tensors)
    with pytest.raises(ValueError, match=word) as caught:
        load_latent(path)
    assert_one_sentence(caught.value, path)


@pytest.mark.parametrize("kind", ["text", "cut short", "bytes zeroed", "small"])
def test_what_is_no_image_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    if kind == "small":
        Image.new("RGB", (7, 64)).save(path)
    else:
        damaged = {"text": b"text", "cut short": whole[:200], "bytes zeroed": whole[:60] + bytes(200)}
        path.write_bytes(damaged[kind])
    with pytest.raises(ValueError) as caught:
        load_image(path)
    assert_one_sentence(caught.value, path)


def test_a_nested_tensor_is_no_latent(tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    torch.save(torch.nested.nested_tensor([torch.zeros(4, 8), torch.zeros(2, 8)]), path)
    with pytest.raises(ValueError, match="tensor") as caught:
        load_latent(path, trust=True)
    assert_one_sentence(caught.value, path)


@pytest.mark.parametrize("suffix", ["pt", "latent"])
def test_a_name_that_is_not_utf_8_is_what_is_said_to_be_wrong(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in\udcff.{suffix}"
    try:
        path.write_bytes(b"")
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    with pytest.raises(ValueError, match="a name that is not UTF-8") as caught:
        load_latent(path, trust=True)
    assert str(caught.value).isascii()
