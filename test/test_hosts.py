"""Ranks on several hosts: this one under several names (test/another_host.sh), each with a daemon of mpirun's of its own.
What ranks of one host share, they do not; their messages go over TCP."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import uuid

import pytest
from test_hangs import wait_until

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = pathlib.Path(os.environ.get("TRAIN_LLAMA", str(ROOT / "train_llama"))).resolve()
SMALL = ["-e", "tiny", "--layers", 1, "--channels", 32, "--heads", 4, "--ffn", 48, "-c", 64, "--generator_mean", 20,
         "--vocab", 64, "--device", "cpu"]
MPI = {"plm": "rsh", "plm_rsh_agent": ROOT / "test" / "another_host.sh", "pml": "ob1", "btl": "tcp,self,vader",
       "btl_tcp_if_include": "lo", "oob_tcp_if_include": "lo"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               **{f"OMPI_MCA_{name}": str(value) for name, value in MPI.items()}}


def hosts_can_be_made_up():
    ours = shutil.which("mpirun") and "Open MPI" in subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    mpi = ours and "(MPI)" in subprocess.run([BINARY, *map(str, SMALL), "--steps", "1"], capture_output=True, text=True).stdout
    return mpi and subprocess.run([MPI["plm_rsh_agent"], "there", "test $(hostname) = there"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not hosts_can_be_made_up(), reason="no Open MPI, or this user may not name a host (unshare)")


def command(hosts, *args):
    """On "a:1,b:2" rank 0 is on a, 1 and 2 are on b."""
    ranks = sum(int(slots) for slots in re.findall(r":(\d+)", hosts))
    return ["mpirun", "--bind-to", "none", "--map-by", "slot", "-np", str(ranks), "--host", hosts, str(BINARY),
            *map(str, [*SMALL, *args])]


def run(*args):
    done = subprocess.run(command(*args), capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(out):
    return re.findall(r"^step (\d+)/\d+ \| loss ([\d.]+) \| norm ([\d.]+)", out, re.M)


def test_hosts_have_ranks_of_their_own():
    """Else this file tests nothing."""
    line = command("a:1,b:2")
    at = line.index(str(BINARY))
    done = subprocess.run([*line[:at], "sh", "-c", "echo $(hostname) $OMPI_COMM_WORLD_LOCAL_SIZE"], capture_output=True,
                          text=True, env=ENVIRONMENT, timeout=60)
    assert sorted(done.stdout.splitlines()) == ["a 1", "b 2", "b 2"], done.stdout + done.stderr


@pytest.mark.parametrize("hosts, backend", [("a:1,b:2,c:1", "ring"), ("a:3,b:1", "ring"), ("a:2,b:2", "ulysses")])
def test_all_ranks_take_one_backend_by_where_the_rings_are(hosts, backend):
    """Rings of two ranks: within a host by Ulysses, and one that crosses hosts makes it the ring for all."""
    out = run(hosts, "--ring", 2, "--attention", "full", "--steps", 3)
    assert f"4 ranks (MPI), 1 thread each, rings of 2 by {backend}" in out
    alone = run("a:4", "--ring", 2, "--attention", "full", "--steps", 3, "--ring_backend", backend)
    assert len(losses(out)) == 3 and losses(out) == losses(alone)


def test_a_run_goes_on_over_other_hosts(tmp_path):
    """What one rank wrote on its host, ranks on others read: the folder is common to all."""
    common = ["--save_every", 2, "-o", tmp_path / "run", "--resume"]
    whole = losses(run("a:2,b:2", "--steps", 6))
    parts = [losses(run(hosts, "--steps", steps, *common)) for hosts, steps in (("a:2,b:2", 2), ("c:1", 4), ("b:1,a:3", 6))]
    assert [step for part in parts for step, *_ in part] == [step for step, *_ in whole]
    for (_, loss, _), (_, other, _) in zip(whole, [line for part in parts for line in part]):
        assert abs(float(loss) - float(other)) < 2e-4


def test_run_nodes_starts_the_ranks_of_all_hosts(tmp_path):
    (tmp_path / "hosts.txt").write_text("a slots=2\nb slots=1\n")
    (tmp_path / "train_llama").symlink_to(BINARY)
    done = subprocess.run(["sh", ROOT / "scripts" / "run_nodes.sh", "hosts.txt", *map(str, SMALL), "--steps", "2"],
                          capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=60)
    assert "3 ranks (MPI), 1 thread each, rings of 3" in done.stdout and "step 2/2" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_on_another_host_ends_all(stop):
    mark = f"TEST_HOSTS={uuid.uuid4()}"
    line = command("a:1,b:2", "--steps", 10000000, "--timeout", 3)
    process = subprocess.Popen([*line[:1], "-x", mark, *line[1:]], env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for out in process.stdout:
        if out.startswith("step 3/"):
            break

    def ranks():
        """The processes of this run's ranks: only these have the mark."""
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if mark in environ and (folder / "exe").resolve() == BINARY:
                    found[int(next(x for x in environ if x.startswith("OMPI_COMM_WORLD_RANK=")).split("=")[1])] = int(folder.name)
            except OSError:  # it has ended, or is not ours
                pass
        return found

    pids = ranks()
    assert sorted(pids) == [0, 1, 2]
    os.kill(pids[2], stop)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "waiting for rank 2 of the world" in rest if stop == signal.SIGSTOP else "signal 9" in rest, rest
    wait_until(lambda: not ranks(), 10, lambda: f"{ranks()} live on")  # the other hosts' daemons end after mpirun
