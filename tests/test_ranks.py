"""Several processes at one piece of work: how they find each other, and miss one that is gone."""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from two_processes import Told

from ternarize import ranks
from ternarize.errors import UsageError
from ternarize.ranks import World, check_gpus, own_part, silence_ends


def new_store() -> Any:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=20))
    return store


def started(store: Any, size: int) -> list[Any]:
    """What so many processes have of a store, started now."""
    with ThreadPoolExecutor(size) as pool:
        wait = timedelta(seconds=20)
        return list(pool.map(lambda rank: own_part(store, rank, size, wait), range(size)))


def test_processes_that_are_started_again_know_nothing_of_what_was_said_before() -> None:
    """Whether there are as many, or fewer, or one had not come."""
    store = new_store()
    first = started(store, 3)
    first[0].set("place", "here")
    assert first[2].get("place") == b"here"
    store.set("ternarize/1", "of a start that went no further")
    for size in (3, 2):
        again = started(store, size)
        assert not any(each.check(["place"]) for each in again)
        again[0].set("place", "there")
        assert again[size - 1].get("place") == b"there"
    assert first[1].get("place") == b"here"


def test_a_process_that_does_not_come_is_named() -> None:
    store = new_store()
    with pytest.raises(RuntimeError, match="rank 1 has not come"):
        own_part(store, 0, 3, timedelta(seconds=0.1))


AGAIN = """
import os, sys
from pathlib import Path
from ternarize.ranks import ranks_of_launcher

count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with ranks_of_launcher() as world:
    assert world.all(count) == [count] * 2
    if count < 1:
        if world.rank:
            os._exit(7)
        world.all(None)
    Path(sys.argv[1], f"{world.rank}").write_text(f"{count}")
"""


@pytest.mark.slow
def test_torchrun_starts_them_again(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(AGAIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*torchrun, "--max-restarts=1", str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == ["1", "1"]


# --- one that vanishes ---------------------------------------------------------------------------


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="the system lists no open files")
def test_connections_break_where_the_other_machine_is_silent() -> None:
    """Those that were made inside, at both ends; others stay as they were."""
    before = tcp_pair()
    with silence_ends():
        made, local = tcp_pair(), socket.socketpair()
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for own in (*before, *local, datagrams):
        assert not own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    for own in made:
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            first, each, count = (
                own.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names
            )
            assert first + each * count == ranks.SILENT
        own.sendall(b"still open")
    for own in (*before, *made, *local, datagrams):
        own.close()


SILENCE = """
import sys, time
from pathlib import Path
from ternarize import ranks
from ternarize.errors import RankError

ranks.SILENT = 4
place = Path(sys.argv[1])
with ranks.ranks_of_launcher() as world:
    world.all(None)
    (place / f"there-{world.rank}").touch()
    if world.rank:
        time.sleep(100)
    try:
        world.all(None)
    except RankError as error:
        (place / "said").write_text(str(error))
        raise SystemExit(3)
"""


NETWORK = ["unshare", "-rn"]  # of its own


def may_have_a_network() -> bool:
    tools = all(map(shutil.which, ("unshare", "ip")))
    up = [*NETWORK, "ip", "link", "set", "lo", "up"]
    return tools and subprocess.run(up, capture_output=True).returncode == 0


def lose_the_network(place: Path) -> int:
    """Run two processes until one waits for the other, and then take the network away; the exit
    code of the one that waits. (In a network of its own.)
    """
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    processes = []
    for rank in range(2):
        where = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SILENCE, str(place)]
        processes.append(subprocess.Popen(command, env={**os.environ, **where}))
    try:
        while not all((place / f"there-{rank}").exists() for rank in range(2)):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
        return processes[0].wait(timeout=60)
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(not may_have_a_network(), reason="no rights to a network of its own")
def test_a_machine_that_vanishes_is_missed(tmp_path: Path) -> None:
    """Seconds after it has fallen silent, and with its connections open."""
    command = [*NETWORK, sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 3, done.stderr
    said = (tmp_path / "said").read_text()
    assert "another process: is gone (" in said and "imed out" in said and "\n" not in said


# --- GPUs ----------------------------------------------------------------------------------------


def test_a_gpu_of_a_number_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number it has in each: a launcher may show each another one as its first."""

    def properties(place: torch.device) -> Any:
        return SimpleNamespace(uuid=f"GPU-{place.index or 0}")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert [ranks.gpu_of(name) for name in ("cuda", "cuda:1", "cpu")] == ["GPU-0", "GPU-1", None]
    said = r"cuda:0 for 2 processes is one GPU \(GPU-0\).*Use --device cuda, .*LOCAL_RANK"
    with pytest.raises(UsageError, match=said):
        check_gpus(Told(("GPU-0", "cuda:1")), "cuda:0")
    check_gpus(Told(("GPU-7", "cuda:0")), "cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_gpus(Told((None, "cuda")), "cuda")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UsageError, match=said.replace("cuda:0", "cuda", 1)):
        check_gpus(Told(("GPU-0", "cuda")), "cuda")
    check_gpus(Told((None, "cpu:0")), "cpu:0")
    check_gpus(World(), "cuda:0")


if __name__ == "__main__":
    raise SystemExit(lose_the_network(Path(sys.argv[1])))
