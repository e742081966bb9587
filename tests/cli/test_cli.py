"""The command line: what it writes, and what it says about wrong input."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Ready, ended
from safetensors.torch import load_file
from torch import Tensor, nn
from vae_helpers import ldm_state, random_latent, small_vae, write, write_vae

from comfyui_patchconv import cli
from comfyui_patchconv.cli import demo
from comfyui_patchconv.cli import vae as cli_vae
from comfyui_patchconv.cli.arguments import size as bytes_of
from comfyui_patchconv.cli.demo import filled
from comfyui_patchconv.files.images import save_image
from comfyui_patchconv.files.latents import load_latent, save_latent
from comfyui_patchconv.hosts.eager_needs import EagerNeeds
from comfyui_patchconv.hosts.memory_estimates import needs_of
from comfyui_patchconv.streaming.call import Call

TILED = ["--mode", "patch", "--splits", "3", "--threshold", "0"]


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return write_vae(tmp_path / "vae.safetensors")


@pytest.fixture
def latent(tmp_path: Path) -> Path:
    save_latent(tmp_path / "in.latent", random_latent(height=9, width=7))
    return tmp_path / "in.latent"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (75, 61, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path / "in.png"


def arguments(job: str, **options: object) -> list[str]:
    return [job, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def run(*argv: str, code: int = 0) -> None:
    assert cli.main(argv) == code


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# Decode and encode


def test_decode_writes_the_same_image_in_strips_and_eagerly(
    tmp_path: Path, vae: Path, latent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strips, eager = tmp_path / "strips.png", tmp_path / "eager.png"
    run(*arguments("decode", vae=vae, latent=latent, out=strips), *TILED)
    run(*arguments("decode", vae=vae, latent=latent, out=eager), "--mode", "plain")
    assert pixels(strips).shape == (72, 56, 3)
    assert np.ptp(pixels(eager)) > 8
    assert np.abs(pixels(strips) - pixels(eager)).max() <= 1
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"{re.escape(str(strips))}: 56x72, \d+\.\d s, peak \d+ MB .*", out.splitlines()[0])
    assert err == ""


def test_decode_makes_the_image_that_the_vae_makes(tmp_path: Path, vae: Path, latent: Path) -> None:
    run(*arguments("decode", vae=vae, latent=latent, out=tmp_path / "out.png"), *TILED)
    with torch.no_grad():
        expected = small_vae().decode(load_latent(latent)).sample[0]  # pyright: ignore
    save_image(tmp_path / "expected.png", expected)
    assert np.abs(pixels(tmp_path / "out.png") - pixels(tmp_path / "expected.png")).max() <= 1


def test_strips_are_used(tmp_path: Path, vae: Path, latent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heights: list[int] = []
    monkeypatch.setattr(cli_vae, "_progress", lambda: lambda module, rows_done, rows: heights.append(rows))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(*arguments("decode", vae=vae, latent=latent, out=tmp_path / "out.png"), "--mode", "plain")
    assert not heights
    run(*arguments("decode", vae=vae, latent=latent, out=tmp_path / "out.png"), *TILED)
    assert set(heights) == {9, 18, 36, 72}


@pytest.mark.parametrize("budget", [(), ("--budget", "1KB")], ids=["no budget", "files"])
def test_streaming_makes_the_same(
    tmp_path: Path, vae: Path, latent: Path, image: Path, budget: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    evaluate = Call.evaluate

    def watch(self: Call, *given: Any) -> None:
        evaluate(self, *given)
        moved.append(self.offloaded)

    monkeypatch.setattr(Call, "evaluate", watch)
    for job, given, suffix in (("decode", {"latent": latent}, "png"), ("encode", {"image": image}, "latent")):
        one, other = tmp_path / f"streamed.{suffix}", tmp_path / f"eager.{suffix}"
        run(*arguments(job, vae=vae, out=one, **given), "--mode", "stream", *budget)
        run(*arguments(job, vae=vae, out=other, **given), "--mode", "plain")
    assert np.abs(pixels(tmp_path / "streamed.png") - pixels(tmp_path / "eager.png")).max() <= 1
    first, second = (load_latent(tmp_path / f"{name}.latent") for name in ("streamed", "eager"))
    assert torch.allclose(first, second, atol=1e-5)
    assert [size > 0 for size in moved] == [bool(budget)] * 2


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("1.5 gb", 1_500_000_000), ("800MB", 800_000_000), ("7", 7), ("3KiB", 3072)]
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert bytes_of(text) == size


def test_a_budget_is_for_streaming(
    tmp_path: Path, vae: Path, latent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = arguments("decode", vae="vae.safetensors", latent="in.latent", out="out.png", budget="1GiB", mode="patch")
    assert_refused(argv, "--mode auto and stream", capsys, tmp_path)


@pytest.mark.parametrize("way", ["eager", "in strips", "streamed"])
def test_a_decode_runs_as_it_fits_and_says_how(
    way: str, tmp_path: Path, vae: Path, latent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "auto.png", tmp_path / "eager.png"
    given = load_latent(latent)
    maps = EagerNeeds(small_vae()).of_call("decode", (given,), {}, given.device, given.dtype)
    eager, patch = needs_of(maps, 64, 0, "cpu", given.dtype)
    budget = {"eager": eager, "in strips": eager - 1, "streamed": patch - 1}[way]
    argv = arguments("decode", vae=vae, latent=latent, out=one, budget=str(budget))
    run(*argv, "--splits", "64", "--threshold", "0")
    told = capsys.readouterr().out
    run(*arguments("decode", vae=vae, latent=latent, out=other), "--mode", "plain")
    assert re.search(rf"weights; auto: {way} \(eager needs \d+ MiB, .* are allowed", told)
    assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_what_fits_is_measured_by_what_is_free_without_a_budget(
    tmp_path: Path, vae: Path, image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, way in ((1 << 30, "eager"), (1 << 10, "streamed")):
        monkeypatch.setattr(cli_vae, "free", lambda device, free=free: free)
        run(*arguments("encode", vae=vae, image=image, out=tmp_path / f"{way}.latent"))
        assert f"; auto: {way} (eager needs " in capsys.readouterr().out
    first, second = (load_latent(tmp_path / f"{way}.latent") for way in ("eager", "streamed"))
    assert torch.allclose(first, second, atol=1e-5)


def test_streaming_takes_over_where_memory_runs_out_all_the_same(
    tmp_path: Path, vae: Path, latent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, raised = nn.functional.group_norm, []

    def full(*args: Any, **kwargs: Any) -> Tensor:
        if not raised and type(args[0]) is Tensor:  # what is counted has no values
            raised.append(None)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "group_norm", full)
    run(*arguments("decode", vae=vae, latent=latent, out=tmp_path / "auto.png"))
    told = capsys.readouterr().out
    assert re.search(r"; auto: eager \(.*\), then streamed \(memory ran out eagerly\)\n$", told)
    run(*arguments("decode", vae=vae, latent=latent, out=tmp_path / "eager.png"), "--mode", "plain")
    assert np.abs(pixels(tmp_path / "auto.png") - pixels(tmp_path / "eager.png")).max() <= 1


def test_files_behind_one_that_did_not_fit_are_streamed_at_once(
    tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was counted for the first file, and found to be too large, is known for the others."""
    counted: list[Any] = []
    count, forward, raised = EagerNeeds.of, nn.functional.group_norm, []

    def full(*args: Any, **kwargs: Any) -> Tensor:
        if type(args[0]) is Tensor:  # neither counted nor streamed
            raised.append(None)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    def counts(self: Any, key: Any, *rest: Any) -> int:
        counted.append(key in self._counted)
        return count(self, key, *rest)

    monkeypatch.setattr(nn.functional, "group_norm", full)
    monkeypatch.setattr(EagerNeeds, "of", counts)
    for name in "abc":
        save_latent(tmp_path / f"{name}.latent", random_latent())
    latents = ["--latent", *(str(tmp_path / f"{name}.latent") for name in "abc")]
    run("decode", "--vae", str(vae), *latents, "--out", str(tmp_path / "out"))
    told = capsys.readouterr().out.splitlines()
    assert len(raised) == 1
    assert "then streamed (memory ran out eagerly)" in told[0]
    assert all(line.endswith("; auto: streamed (memory ran out before)") for line in told[1:3]), told
    assert counted == [False]


def test_a_batch_becomes_numbered_images(tmp_path: Path, vae: Path) -> None:
    both = random_latent(batch=2)
    save_latent(tmp_path / "in.latent", both)
    run(*arguments("decode", vae=vae, latent=tmp_path / "in.latent", out=tmp_path / "out.png"))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-0001.png", "out-0002.png"]
    save_latent(tmp_path / "second.latent", both[1:])
    run(*arguments("decode", vae=vae, latent=tmp_path / "second.latent", out=tmp_path / "second.png"))
    assert np.abs(pixels(tmp_path / "out-0002.png") - pixels(tmp_path / "second.png")).max() <= 1


def test_encode_writes_the_same_latent_in_strips_and_eagerly(tmp_path: Path, vae: Path, image: Path) -> None:
    strips, eager = tmp_path / "strips.latent", tmp_path / "eager.latent"
    run(*arguments("encode", vae=vae, image=image, out=strips), *TILED)
    run(*arguments("encode", vae=vae, image=image, out=eager), "--mode", "plain")
    first, second = load_latent(strips), load_latent(eager)
    assert first.shape == (1, 4, 9, 7)
    assert second.std() > 0.01
    assert torch.allclose(first, second, atol=1e-5)
    assert load_file(strips).keys() == {"latent_tensor", "latent_format_version_0"}


def test_a_whole_checkpoint_is_decoded_in_half_precision(tmp_path: Path, latent: Path) -> None:
    state = {f"first_stage_model.{name}": value.half() for name, value in ldm_state(small_vae()).items()}
    checkpoint = write(tmp_path / "sd.safetensors", state)
    for dtype in ("float32", "bfloat16"):
        run(*arguments("decode", vae=checkpoint, latent=latent, out=tmp_path / f"{dtype}.png", dtype=dtype), *TILED)
    assert np.abs(pixels(tmp_path / "float32.png") - pixels(tmp_path / "bfloat16.png")).mean() < 4


# Wrong input


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(argv: list[str], word: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    before = snapshot(folder)
    run(*argv, code=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"patchconv[^\n]*: [^\n]+\.\n", err), err
    assert word in err
    assert len(err) < 600
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("vae", "missing.safetensors", "does not exist"),
        ("vae", "in.png", "not a safetensors file"),
        ("vae", "in.latent", "no VAE"),
        ("vae", ".", "folder"),
        ("latent", "missing.latent", "does not exist"),
        ("latent", "in.png", "not a safetensors file"),
        ("latent", "vae.safetensors", "latent_tensor"),
        ("latent", "x" * 300 + ".latent", "too long"),
        ("out", "missing/out.png", "does not exist"),
        ("out", "out", ".png"),
        ("out", "out.jpg", ".png"),
        ("out", "folder.png", "folder"),
        ("splits", "-1", "whole number"),
        ("splits", "2.5", "whole number"),
        ("splits", "four", "whole number"),
        ("splits", "٣", "whole number"),
        ("threshold", "-1", "whole number"),
        ("threshold", "", "whole number"),
        ("dtype", "float64", "float64"),
        ("device", "tpu", "tpu"),
        ("device", "meta", "meta"),
        ("device", "hpu", "hpu"),
        ("device", "xla", "xla"),
        ("device", "cuda:99", "cuda:99"),
        ("device", "", "cannot be used"),
        ("speed", "fast", "speed"),
        ("mode", "tiled", "tiled"),
        ("budget", "0", "above 0"),
        ("budget", "lots", "2GiB"),
        ("budget", f"{'9' * 400}GB", "more than any machine has"),
        ("silent-seconds", "9" * 400, "more than a year"),
        ("latent", os.devnull, "is a device or a pipe"),
        ("vae", os.devnull, "is a device or a pipe"),
    ],
)
def test_a_wrong_option_of_decode_is_one_sentence(
    tmp_path: Path,
    vae: Path,
    latent: Path,
    image: Path,
    option: str,
    value: str,
    word: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    options = {"vae": "vae.safetensors", "latent": "in.latent", "out": "out.png", option: value}
    assert_refused(arguments("decode", **options), word, capsys, tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("image", "missing.png", "does not exist"),
        ("image", "vae.safetensors", "not an image"),
        ("image", ".", "folder"),
        ("out", "out.png", ".latent or .safetensors"),
        ("out", "missing/out.latent", "does not exist"),
    ],
)
def test_a_wrong_option_of_encode_is_one_sentence(
    tmp_path: Path,
    vae: Path,
    image: Path,
    option: str,
    value: str,
    word: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"vae": "vae.safetensors", "image": "in.png", "out": "out.latent", option: value}
    assert_refused(arguments("encode", **options), word, capsys, tmp_path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"size": 8}, "64 to 16384"),
        ({"size": "big"}, "big"),
        ({"size": 64, "out": "file/demo"}, "not a folder"),
        ({"vae": "random", "latent": "none.latent"}, "none.latent does not exist"),
        ({"latent": "in.latent"}, "--vae"),
        ({"vae": "."}, "folder"),
    ],
)
def test_a_wrong_option_of_demo_is_one_sentence(
    tmp_path: Path,
    options: dict[str, object],
    word: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert_refused(arguments("demo", **options), word, capsys, tmp_path)


@pytest.mark.parametrize("argv", [[], ["decode"], ["draw"], ["--version"]])
def test_a_command_line_without_a_whole_command_is_refused(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(argv, "--help", capsys, tmp_path)


def test_a_latent_of_another_model_is_refused(tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_latent(tmp_path / "flux.latent", random_latent(16))
    options = arguments("decode", vae=vae, latent=tmp_path / "flux.latent", out=tmp_path / "out.png")
    assert_refused(options, "16 channels and the VAE decodes 4", capsys, tmp_path)


def test_an_image_that_overflows_is_not_written(
    tmp_path: Path, latent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = small_vae().state_dict()
    state["decoder.conv_out.bias"] *= torch.nan
    options = arguments("decode", vae=write(tmp_path / "vae.safetensors", state), latent=latent, out=tmp_path / "o.png")
    assert_refused(options, "NaN", capsys, tmp_path)


# Real processes


def test_the_process_says_one_sentence_and_ends_with_2(tmp_path: Path, vae: Path) -> None:
    argv = arguments("decode", vae=vae, latent="none.latent", out="out.png")
    done = ended(["-m", "comfyui_patchconv.cli", *argv], tmp_path)
    assert done.returncode == 2
    assert done.stderr == "patchconv: none.latent does not exist: check the name and the folder.\n"


LIMITED = """
import resource, sys
from comfyui_patchconv import cli
from comfyui_patchconv import streaming
from comfyui_patchconv.cli.arguments import size as bytes_of
from comfyui_patchconv.cli.demo import filled
from pathlib import Path
from typing import Any
import diffusers.models.autoencoders.autoencoder_kl
def limit(kind, size):
    resource.setrlimit(kind, (size, size))
"""


def test_out_of_memory_is_one_sentence_and_ends_with_3(tmp_path: Path, vae: Path, ready: Ready) -> None:
    save_latent(tmp_path / "in.latent", random_latent(height=64, width=64))
    used = "int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()"
    code = f"{LIMITED}\nlimit(resource.RLIMIT_AS, {used} + (20 << 20))\nsys.exit(cli.main())"
    argv = arguments("decode", vae=vae, latent="in.latent", out="out.png")
    done = ready.ended(argv, code, tmp_path)
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(r"patchconv: out of memory \([^\n]+\): try [^\n]+\.\n", done.stderr), done.stderr
    assert not (tmp_path / "out.png").exists()


def test_a_full_disk_is_one_sentence(tmp_path: Path, vae: Path, image: Path, ready: Ready) -> None:
    code = f"{LIMITED}\nimport signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nlimit(resource.RLIMIT_FSIZE, 600)"
    argv = arguments("encode", vae=vae, image=image, out="out.latent")
    done = ready.ended(argv, f"{code}\nsys.exit(cli.main())", tmp_path)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"patchconv: out.latent cannot be written [^\n]+\n", done.stderr), done.stderr
    assert not (tmp_path / "out.latent").exists()


def demo_table(said: str) -> tuple[float, ...]:
    """The largest differences that the demo printed: of tiles, Patch Conv and streaming."""
    figures = r" +\d+ MB +\d+\.\d s"
    beside = rf"{figures} +[+-]\d+% memory, [+-]\d+% time"
    rows = rf"peak memory +time\neager{figures}\ntiles{beside}\nPatch Conv{beside}\nstreaming{beside}\n"
    assert re.search(rows, said), said
    found = re.search(
        r"Largest difference to the eager image: (\S+) \(tiles\), (\S+) \(Patch Conv\), (\S+) \(streaming\);", said
    )
    assert found is not None, said
    return tuple(float(value) for value in found.groups())


@pytest.mark.slow  # five processes, of which four import diffusers anew
def test_demo_writes_the_images_and_prints_the_table(tmp_path: Path, vae: Path, ready: Ready) -> None:
    argv = arguments("demo", vae=vae, size=64, threshold=0, splits=3, out="new/folder")
    done = ready.ended(argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert all(value < 1e-4 for value in demo_table(done.stdout)[1:])
    assert pixels(tmp_path / "new" / "folder" / "image.png").shape == (64, 64, 3)
    for name in ("memory.png", "comparison.png"):
        assert np.ptp(pixels(tmp_path / "new" / "folder" / name)) > 100


@pytest.mark.slow
def test_demo_shows_a_photograph_that_tiles_change_and_strips_do_not(tmp_path: Path, ready: Ready) -> None:
    done = ready.ended(arguments("demo", size=576), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "small VAE" in done.stdout
    assert "--vae random" in done.stdout
    tiles, strips, streaming = demo_table(done.stdout)
    assert tiles > 0.02
    assert max(strips, streaming) < 1e-4
    assert pixels(tmp_path / "demo" / "image.png").shape == (576, 576, 3)


def test_demo_repeats_the_photograph_to_the_size_that_is_asked_for() -> None:
    latent = torch.arange(6.0).reshape(1, 1, 2, 3)
    larger = filled(latent, 5, 4)
    assert larger[0, 0, :, 0].tolist() == [0, 3, 3, 0, 0]
    assert larger[0, 0, 0].tolist() == [0, 1, 2, 2]
    assert torch.equal(filled(latent, 1, 2), latent[..., :1, :2])


def test_demo_takes_the_small_vae_the_random_one_or_a_file(tmp_path: Path, vae: Path) -> None:
    parse = cli.parser().parse_args
    assert demo.settings_of(parse(["demo"])) == demo.DemoSettings()
    assert demo.DemoSettings().vae == demo.SMALL_VAE
    assert demo.DemoSettings().latent == demo.PHOTOGRAPH
    drawn = demo.settings_of(parse(["demo", "--vae", "random"]))
    assert (drawn.vae, drawn.latent) == (None, None)
    given = demo.settings_of(parse(arguments("demo", vae=vae, latent="in.latent")))
    assert (given.vae, given.latent) == (vae, Path("in.latent"))


def test_ctrl_c_is_not_for_the_process_that_a_demo_decodes_in(tmp_path: Path) -> None:
    """It ends the other one, and that this one: on Windows both get the signal."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    before = signal.getsignal(signal.SIGINT)
    try:
        demo._send(sender, demo.DemoSettings(vae=tmp_path / "missing.safetensors"), "plain")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(receiver.recv(), FileNotFoundError)


def test_demo_with_a_wrong_file_writes_nothing(tmp_path: Path, vae: Path, ready: Ready) -> None:
    (tmp_path / "in.latent").write_text("damaged")
    done = ready.ended(arguments("demo", vae=vae, latent="in.latent"), folder=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"patchconv: in.latent is not a safetensors file[^\n]+\.\n", done.stderr), done.stderr
    assert not (tmp_path / "demo").exists()


def _commands(parser: Any) -> Iterator[Any]:
    inside = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inside:
        for one in action.choices.values():
            yield from _commands(one)
    if not inside:
        yield parser


@pytest.mark.parametrize("command", list(_commands(cli.parser())), ids=lambda command: command.prog)
def test_who_runs_out_of_memory_is_told_of_options_that_there_are(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> None:
        raise MemoryError("all is taken")

    args = argparse.Namespace(job="", **{**command._defaults, "run": run})
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *_: args)
    assert cli.main() == 3
    told = re.findall(r"--[\w-]+", capsys.readouterr().err.split("try ")[1])
    assert set(told) <= {name for action in command._actions for name in action.option_strings}
