"""One call over worker processes: the same result, weights that are sent once, and whatever ends one of them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from devices_toys import Drawing, EndingSoon, Half, Kept, Unreadable, half, latent
from processes import LIMIT, environment, until
from torch import nn
from torch.nn.utils import parametrizations

from comfyui_patchconv.conv.partial import PartialPadding
from comfyui_patchconv.hosts.clones import Wrapper
from comfyui_patchconv.hosts.devices import spread as spreading
from comfyui_patchconv.hosts.devices.frames import START
from comfyui_patchconv.hosts.devices.packing import CannotSendError, packed, unpacked
from comfyui_patchconv.hosts.devices.spread import Outcome, Spread, end_all, others_than
from comfyui_patchconv.hosts.devices.team import DevicesError, Worker
from comfyui_patchconv.hosts.streamed import StreamedForward
from comfyui_patchconv.hosts.upscale import StreamedUpscaler, joined
from comfyui_patchconv.streaming import Tuning
from comfyui_patchconv.streaming.spread.ranks import bytes_of

from .test_clones import Patcher, Z, in_strips, vae
from .upscaler import upscaler

CPU = torch.device("cpu")
SECONDS = LIMIT
ALWAYS = Tuning(strip_bytes=1, always=True, silent_seconds=SECONDS, allocator_bytes=0)


class Run:
    """A stand-in for a network's `forward` that spreads, and what it has told."""

    def __init__(self, network: nn.Module, wanted: str = "all", seconds: float = SECONDS, **options: Any) -> None:
        self.outcomes: list[Outcome] = []
        spread = Spread(
            wanted, look=options.pop("look", lambda: None), on_outcome=self.outcomes.append, seconds=seconds
        )
        forward = type(network).forward.__get__(network)
        tuning = ALWAYS if seconds == SECONDS else Tuning(1, 0, True, silent_seconds=seconds)
        self.stand_in = StreamedForward(forward, 0, lambda _: 1 << 30, tuning=tuning, spread=spread, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.stand_in.start()
        with torch.inference_mode():
            return self.stand_in(*args, **kwargs)


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(spreading.WORKERS, "2")


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    running = pids()
    end_all()
    assert not any(is_there(pid) for pid in running)


def pids() -> list[int]:
    return [pid for team in spreading._teams.values() for pid in team.processes]


def is_there(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert float((one - other).abs().max()) <= 1e-5 * float(other.max() - other.min())


@pytest.mark.parametrize(("wanted", "over"), [("all", "3 processes"), ("2", "2 processes"), ("8", "3 processes")])
def test_the_same_picture(wanted: str, over: str) -> None:
    network, z = half(), latent()
    run = Run(network, wanted)
    made = run(z)
    assert run.outcomes == [Outcome(over)]
    assert_same(made, network(z))


def test_another_number_of_devices_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that is kept is one for as many ranks."""
    network, z = half(), latent()
    run = Run(network)
    for count in (2, 1, 0, 2):
        monkeypatch.setenv(spreading.WORKERS, str(count))
        assert_same(run(z), network(z))
    assert [outcome.over for outcome in run.outcomes] == ["3 processes", "2 processes", "", "3 processes"]


@pytest.mark.parametrize("padding", [None, PartialPadding])
def test_a_hosts_clone_computes_with_its_own_weights(padding: Any) -> None:
    """And what stands in for convolutions goes with them, while what stands in for a decoder stays."""
    outcomes: list[Outcome] = []
    spread = Spread("2", on_outcome=outcomes.append, seconds=SECONDS)
    one, other, alone = Patcher(vae(1)), Patcher(vae(2)), vae(2)
    for patcher in (one, other):
        if padding is not None:
            in_strips(patcher, padding)
    forward = one.get_model_object("decoder.forward")
    one.object_patches["decoder.forward"] = StreamedForward(forward, 0, lambda _: 1 << 30, tuning=ALWAYS, spread=spread)
    expected = alone.decode(Z) if padding is None else other.decode(Z)
    clone = one.deepclone(vae(2))
    assert_same(clone.decode(Z), expected)
    assert_same(clone.decode(Z), expected)
    one.decode(Z)
    assert_same(clone.decode(Z), expected)
    assert outcomes == [Outcome("2 processes")] * 4


def test_workers_and_weights_stay_until_weights_change(tmp_path: Path) -> None:
    network, z = half(), latent()
    run = Run(network)
    run(z)
    before, (team,) = pids(), {team for team in spreading._teams.values() if team.processes == pids()}
    held = [worker.held for worker in team._workers]
    run(z)
    assert pids() == before
    assert [worker.held for worker in team._workers] == held
    network.last.weight.mul_(2)
    assert_same(run(z), network(z))
    assert [worker.held for worker in team._workers] != held
    other = half(7)
    for one in (other, network, half(8), other):
        assert_same(Run(one)(z), one(z))
    assert pids() == before


def test_lists_and_random_numbers() -> None:
    """What a call puts into a list is there once, and random numbers are those of one process."""
    network, z = half(), latent()
    seen: list[Any] = []
    Run(network)(z, seen)
    assert seen == [24]
    drawing = Drawing().requires_grad_(False)
    torch.manual_seed(3)
    expected = drawing(z)
    torch.manual_seed(3)
    run = Run(drawing)
    assert_same(run(z), expected)
    assert run.outcomes == [Outcome("3 processes")]


def test_autocast_is_on_in_all_of_them() -> None:
    """A WebUI encodes under it."""
    network, z = half(), latent()
    run = Run(network)
    with torch.autocast("cpu", torch.bfloat16):
        made, expected = run(z), network(z)
    assert run.outcomes == [Outcome("3 processes")]
    assert made.dtype == expected.dtype == torch.bfloat16
    exact = half()(z)
    assert float((made - exact).abs().mean()) <= 1.05 * float((expected - exact).abs().mean())
    assert_same(run(z), exact)


def test_a_host_that_loads_tensors_in_its_own_way() -> None:
    network, z = half(), latent()
    outcomes: list[Outcome] = []
    spread = Spread("2", ("devices_toys:refuse_to_load",), on_outcome=outcomes.append, seconds=SECONDS)
    stand_in = StreamedForward(network.forward, 0, lambda _: 1 << 30, tuning=ALWAYS, spread=spread)
    assert_same(stand_in(z), network(z))
    assert outcomes == [Outcome("2 processes")]


def test_a_worker_that_cannot_read_what_it_is_asked_ends() -> None:
    worker = Worker(1, CPU, ())
    try:
        assert worker.answer(SECONDS, lambda: None) == ""
        worker.ask("hold", name=Unreadable())
        with pytest.raises(DevicesError, match="has ended with status 1"):
            worker.answer(SECONDS, lambda: None)
    finally:
        worker.kill()


def test_a_worker_that_is_asked_nothing_for_long_ends_in_peace(tmp_path: Path) -> None:
    """And leaves the folder, which the host and other workers go on using."""
    worker = Worker(1, CPU, ())
    worker.ask(
        "join", folder=str(tmp_path), path=str(tmp_path / "0"), rank=0, count=1, seconds=SECONDS, device="cpu",
        threads=1, then=EndingSoon(),
    )  # fmt: skip
    try:
        assert worker.wait(SECONDS, lambda: None) == ""
        with pytest.raises(DevicesError, match="has ended with status 0"):
            worker.answer(SECONDS, lambda: None)
        assert tmp_path.exists()
    finally:
        worker.kill()


def test_a_worker_whose_host_cannot_prepare_it_ends_with_a_status() -> None:
    worker = Worker(1, CPU, ("devices_toys:fail",))
    try:
        with pytest.raises(DevicesError, match="has ended with status 1"):
            worker.answer(SECONDS, lambda: None)
    finally:
        worker.kill()


@pytest.mark.parametrize("prints", ["print('hello')", "import os; os.write(1, bytes(range(256)) * 300)"])
def test_what_is_printed_before_a_worker_begins_is_no_answer(
    prints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what an installation runs at Python's start."""
    (tmp_path / "sitecustomize.py").write_text(prints, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Worker(1, CPU, ())
    try:
        assert worker.answer(SECONDS, lambda: None) == ""
    finally:
        worker.kill()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"hello", "has ended with status 0"),
        (START + b"hello", "has ended with status 0"),
        (START + b"\xff" * 64, r"has answered what cannot be read \(.*Error: .*\)"),
        (START + b"\x00" * 7 + b"\x40", r"has answered what cannot be read \(.*Error.*\)"),
        (START + b"\x08" + bytes(7) + b"no data." * 9, r"has answered what cannot be read \(UnpicklingError: .*\)"),
    ],
)
def test_a_worker_whose_answers_cannot_be_read_is_gone(
    given: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reading them raises: it is not waited for."""
    code = f"import os, sys, time; os.write(1, {given!r}); 'status' in sys.argv[1] or time.sleep(10_000)"
    command, popen = [sys.executable, "-c", code, said], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **pipes: popen(command, **pipes))
    worker = Worker(1, CPU, ())
    try:
        with pytest.raises(DevicesError, match=rf"^rank 1 \(cpu, process \d+\) {said}$"):
            worker.answer(SECONDS, lambda: None)
    finally:
        worker.kill()


def test_workers_import_this_package_and_none_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host may have loaded it from a folder that is on no search path."""
    package = Worker.__module__.partition(".")[0]
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('this is another')")
    monkeypatch.syspath_prepend(tmp_path)
    worker = Worker(1, CPU, ())
    try:
        assert worker.answer(SECONDS, lambda: None) == ""
    finally:
        worker.kill()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "raised LookupError: nothing is there"),
        ("runs out", "raised OutOfMemoryError: CUDA out of memory"),
        ("is killed", "has ended with status 15" if sys.platform == "win32" else "was ended by signal 9"),
    ],
)
def test_a_worker_that_fails(how: str, said: str) -> None:
    """The call is made on one device, with a sentence that names the rank, and the next one over all again."""
    network, z = half(), latent()
    network.kept = Kept(how)
    seen: list[Any] = []
    run = Run(network, "2")
    made = run(z, seen)
    (outcome,) = run.outcomes
    assert outcome.over == ""
    assert outcome.alone.startswith("rank 1 (cpu, process ")
    assert outcome.alone.endswith(said)
    assert seen == [24]
    network.kept = Kept()
    assert_same(made, network(z))
    assert_same(run(z), network(z))
    assert run.outcomes[1:] == [Outcome("2 processes")]


@pytest.mark.slow
def test_a_worker_that_hangs() -> None:
    network, z = half(), latent()
    run = Run(network, "2", seconds=9)
    run(z)
    network.kept = Kept("hangs")
    made = run(z)
    assert run.outcomes[1].alone.startswith("rank 1 (cpu, process ")
    assert run.outcomes[1].alone.endswith("has not answered for 5 s")
    assert_same(made, half()(z))


class Cancel(Exception):  # noqa: N818
    """As a host's interrupt."""


@pytest.mark.parametrize("where", ["strips", "waiting"])
def test_cancel_ends_it_on_all(where: str) -> None:
    """At once where this process computes, and where it waits for a worker; the workers stay."""
    network, z = half(), latent()
    asked = [False]

    def look(*_: int) -> None:
        if asked[0]:
            raise Cancel

    options: dict[str, Any] = {"look" if where == "waiting" else "on_progress": look}
    run = Run(network, **options)
    run(z)
    before = pids()
    network.kept = Kept("is slow")
    asked[0] = True
    with pytest.raises(Cancel):
        run(z)
    asked[0] = False
    network.kept = Kept()
    assert_same(run(z), network(z))
    assert [outcome.over for outcome in run.outcomes][-1] == "3 processes"
    assert pids() == before


def test_what_cannot_be_sent_runs_here() -> None:
    network, z = half(), latent()
    network.lock = threading.Lock()  # type: ignore[assignment]
    run = Run(network)
    assert_same(run(z), network(z))
    (outcome,) = run.outcomes
    assert outcome.alone.startswith("the model cannot be sent to other processes (")
    assert "lock" in outcome.alone


@contextmanager
def of_a_pack_that_workers_lack() -> Iterator[nn.Module]:
    """A model whose module is in this process alone."""
    kind = type("Missing", (Half,), {"__module__": "some_pack.nodes"})
    module = ModuleType("some_pack.nodes")
    module.__dict__["Missing"] = kind
    sys.modules |= {"some_pack": ModuleType("some_pack"), "some_pack.nodes": module}
    try:
        yield kind().requires_grad_(False)
    finally:
        del sys.modules["some_pack"], sys.modules["some_pack.nodes"]


def test_what_a_worker_cannot_import_runs_here() -> None:
    with of_a_pack_that_workers_lack() as network:
        run, z = Run(network, "2"), latent()
        assert_same(run(z), network(z))
    assert run.outcomes[0].alone.endswith("cannot have the model: ModuleNotFoundError: No module named 'some_pack'")


def test_what_all_workers_refused_is_sent_to_all_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_all()  # those to come have this folder on their path
    monkeypatch.syspath_prepend(str(tmp_path))
    with of_a_pack_that_workers_lack() as network:
        run, z = Run(network), latent()
        run(z)
        assert "cannot have the model" in run.outcomes[0].alone
        (tmp_path / "some_pack").mkdir()
        (tmp_path / "some_pack" / "nodes.py").write_text(
            "from devices_toys import Half\n\n\nclass Missing(Half):\n    pass\n", encoding="utf-8"
        )
        assert_same(run(z), network(z))
    assert run.outcomes[1:] == [Outcome("3 processes")]
    end_all()


def test_one_device_computes_alone_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    network, z = half(), latent()
    for wanted in ("one", "1"):
        run = Run(network, wanted)
        assert_same(run(z), network(z))
        assert run.outcomes == [Outcome()]
    monkeypatch.delenv(spreading.WORKERS)
    run = Run(network)
    assert_same(run(z), network(z))
    assert run.outcomes[0].alone.startswith("there is no other than the CPU (PATCHCONV_CPU_WORKERS=2 would")


@pytest.mark.parametrize("text", ["two", "-1", "65"])
def test_no_number_of_workers(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(spreading.WORKERS, text)
    with pytest.raises(ValueError, match="use a whole number of worker processes up to 64"):
        others_than(CPU)


@pytest.mark.parametrize("wanted", ["", "none", "0", 2])
def test_what_is_no_choice_of_devices_is_refused(wanted: Any) -> None:
    with pytest.raises(ValueError, match=r"^devices is .*: use one, all or a number of devices such as 2\.$"):
        Spread(wanted)


def test_the_default_group_is_left_alone() -> None:
    """Whoever has made one: it is there before, meanwhile and after."""
    c10d: Any = dist
    dist.init_process_group("gloo", store=c10d.HashStore(), rank=0, world_size=1)
    try:
        before = dist.group.WORLD
        network, z = half(), latent()
        run = Run(network)
        assert_same(run(z), network(z))
        assert run.outcomes == [Outcome("3 processes")]
        assert dist.group.WORLD is before
    finally:
        dist.destroy_process_group()


def test_workers_that_are_busy_are_left_alone() -> None:
    network, z = half(), latent()
    run = Run(network)
    run(z)
    with ExitStack() as busy:
        for team in spreading._teams.values():  # other tests have some of their own
            busy.enter_context(team._lock)
        assert_same(run(z), network(z))
    assert run.outcomes[-1].alone == "the workers are busy with another call"


def test_pictures_are_upscaled_over_devices() -> None:
    model = upscaler()
    images = torch.rand(2, 40, 24, 3, generator=torch.Generator().manual_seed(0))
    outcomes: list[Outcome] = []
    spread = Spread("all", on_outcome=outcomes.append, seconds=SECONDS)
    runner = StreamedUpscaler(model, 0, lambda _: 1 << 30, output=(CPU, torch.float32), spread=spread)
    runner.start()
    made = joined(runner.frames(images, CPU, torch.float32), 2)
    assert_same(made, model(images.movedim(-1, 1)).movedim(1, -1))
    assert outcomes == [Outcome("3 processes")] * 2


def test_a_packed_network_arrives_as_it_was() -> None:
    """Types, layouts, what is shared, and devices, but not what stands in for methods."""
    network: Any = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.half, network.again, network.forward = torch.ones(2, dtype=torch.bfloat16), network.weight, Wrapper()
    network.device, network.scalar, network.empty = CPU, torch.tensor(True), torch.empty(0, 3)
    one = packed((network, network.weight), CPU)
    received = [bytes_of(tensor, CPU) for tensor in one.tensors]
    other, weight = unpacked(one.looks, received, one.rest, torch.device("meta"))
    assert other.weight is other.again is weight
    assert type(weight) is nn.Parameter
    assert (other.device.type, other.weight.device.type, weight.shape) == ("meta", "meta", network.weight.shape)
    assert "forward" not in vars(other)
    there, _ = unpacked(one.looks, received, one.rest, CPU)
    for name, value in {**dict(network.named_parameters()), **vars(network)}.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(there, name), value)
            assert getattr(there, name).stride() == value.stride()
    name = one.name
    assert name == packed((network, network.weight), CPU).name
    with torch.no_grad():
        network.weight[0, 0, 0, 0] += 1
    assert name != packed((network, network.weight), CPU).name
    with pytest.raises(CannotSendError, match="a tensor of the kind Tensor cannot be sent"):
        packed(torch.empty(2, device="meta"), CPU)


def test_packing_what_has_no_name() -> None:
    """Functions and classes made within functions, which refer to each other, and weights that are made anew."""

    def outer(scale: float = 2.0) -> Any:
        class Scaled(nn.Module):
            count = 0

            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return twice(self.conv(x)) * scale

        def twice(x: torch.Tensor, *, times: float = 2.0, of: type = Scaled) -> torch.Tensor:
            return x * times + of.count

        return Scaled

    for make in (outer(), partialmethod_class(), lambda: parametrizations.weight_norm(nn.Conv2d(3, 3, 1))):
        network, x = make().requires_grad_(False), torch.randn(1, 3, 4, 4)
        one = packed(network.forward, CPU)
        other = unpacked(one.looks, [bytes_of(tensor, CPU) for tensor in one.tensors], one.rest, CPU)
        assert other.__self__ is not network
        assert torch.equal(other(x), network(x))
        assert one.rest == packed(network.forward, CPU).rest


def partialmethod_class() -> Any:
    class Narrow(nn.Conv2d):
        __init__: Any = partialmethod(nn.Conv2d.__init__, 3, 3)

    narrow: Any = Narrow
    return lambda: narrow(1)


HOST = """
import os, sys, time, torch
sys.path[:0] = sys.argv[1:3]
from comfyui_patchconv.hosts.devices.spread import Spread, _teams
from comfyui_patchconv.streaming import Streamed, Tuning
from devices_toys import half, latent
streamed = Streamed(tuning=Tuning(strip_bytes=1, always=True))
Spread("all").call(streamed, half().forward, (latent(),), {}, torch.device("cpu"), shared=False)
print(*(pid for team in _teams.values() for pid in team.processes), flush=True)
time.sleep(10_000)
"""


@pytest.mark.slow
def test_a_host_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOST, str(root), str(root / "tests")]
    more: dict[str, Any] = {"TMPDIR": tmp_path, "TEMP": tmp_path, spreading.WORKERS: 2}
    host = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(**more))
    assert host.stdout is not None
    running = [*map(int, host.stdout.readline().split())]
    assert len(running) == 2
    assert all(map(is_there, running))
    assert [*tmp_path.glob("patchconv-*")]
    host.kill()
    host.wait()
    until(lambda: not any(map(is_there, running)))
    assert not [*tmp_path.glob("patchconv-*")]
