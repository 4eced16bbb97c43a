"""The kit for a GPU machine without network, rehearsed on a CPU: parts, limits, steps, and each failure on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

import vega_edge

from .full import IN_FULL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the GPU machine runs Linux")
if sys.platform == "linux":
    from vega_edge.benchmarks.gpu_kit import calls, pack, prepare, runner, steps, store, wheels, work
    from vega_edge.benchmarks.gpu_kit.steps import Attempt, Step

ROOT = Path(vega_edge.__file__).parent


# wheels: by their names, without network


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("onnxruntime_gpu-1.31.1-cp312-cp312-manylinux_2_28_x86_64.whl", ""),
        ("diffusers-0.42.1-py3-none-any.whl", ""),
        ("tensorrt_rtx_cu13_libs-1.7.1.116-py3-none-manylinux_2_28_x86_64.whl", ""),
        ("tensorrt_rtx_cu13_bindings-1.7.1.116-cp312-none-manylinux_2_28_x86_64.whl", ""),
        ("tokenizers-0.23.2-cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", ""),
        ("onnxruntime_gpu-1.31.1-cp311-cp311-manylinux_2_28_x86_64.whl", "is for cp311, and the machine has cp312"),
        ("tokenizers-0.23.2-cp313-abi3-manylinux_2_17_x86_64.whl", "is for cp313, and the machine has cp312"),
        ("numpy-2.5.2-cp312-cp312t-manylinux_2_28_x86_64.whl", "has the ABI cp312t, and the machine has cp312"),
        ("onnxruntime_gpu-1.31.1-cp312-cp312-win_amd64.whl", "is for win_amd64"),
        ("numpy-2.5.2-cp312-cp312-manylinux_2_28_aarch64.whl", "is for manylinux_2_28_aarch64"),
        ("numpy-2.5.2-cp312-cp312-manylinux_2_41_x86_64.whl", "is for manylinux_2_41_x86_64"),
        ("numpy-2.5.2-cp312-cp312-musllinux_1_2_x86_64.whl", "is for musllinux_1_2_x86_64"),
    ],
)
def test_which_wheels_the_machine_takes(file, why):
    assert wheels.fault(file).removeprefix(f"{file} ").startswith(why)
    assert bool(wheels.fault(file)) == bool(why)


@pytest.mark.parametrize(
    "files", [[], ["a-1-py3-none-any.whl", "b-1-py3-none-any.whl"], ["a-2-py3-none-any.whl"], ["a.whl"]]
)
def test_other_wheels_than_those_wanted(files):
    wheels.check(["a-1-py3-none-any.whl"], ("a==1",))
    with pytest.raises(SystemExit):
        wheels.check(files, ("a==1",))


# parts: sent one after another


def wheel(folder, name, **files):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as out:
        for file, content in files.items():
            out.writestr(file.replace("__", "/"), content)
    return path


def noise(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def sent(tmp_path):
    """A folder of parts: two archives in the first two or three, the last archive in a part of its own."""
    archives = {}
    for i, name in enumerate(("first", "second", "last")):
        made = wheel(tmp_path, name, **{f"{name}__data": noise(300_000, i), f"{name}-1.0.data__scripts__x": b"no", f"{name}-1.0.data__purelib__{name}__more": b"yes"})  # fmt: skip
        archives[name] = tmp_path / f"{name}.tar.xz"
        pack.repack([made], archives[name], preset=0)
    folder = tmp_path / "kit"
    count = pack.split(archives, folder, 400_000, "last", {"commit": "x"})
    assert count == 3
    assert max(sum(f.stat().st_size for f in part.iterdir()) for part in folder.iterdir()) <= 400_000
    return [pack.part_folder(folder, number) for number in range(1, count + 1)]


def refused(part, into):
    with pytest.raises(store.KitError) as caught:
        store.receive(part, into)
    return str(caught.value)


def test_parts_become_packages(sent, tmp_path):
    into = tmp_path / "store"
    assert [store.receive(part, into) for part in sent] == [["first"], ["second"], ["last"]]
    for i, name in enumerate(("first", "second", "last")):
        assert (into / "site" / name / "data").read_bytes() == noise(300_000, i)
        assert (into / "site" / name / "more").read_bytes() == b"yes"
    assert not list(into.rglob("x"))
    assert [store.receive(part, into) for part in sent] == [[], [], []]  # a second time changes nothing
    assert store.complete(into) == {"first", "second", "last"}


def test_a_part_that_is_missing_is_named(sent, tmp_path):
    into = tmp_path / "store"
    assert refused(sent[1], into) == "part-01 has not come yet: send it before part-02"
    assert [store.receive(part, into) for part in sent] == [["first"], ["second"], ["last"]]


def test_a_part_that_was_not_carried(tmp_path):
    assert "among those that the command carries" in refused(tmp_path / "part-01", tmp_path / "store")


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
    ],
)
def test_a_damaged_piece_is_refused_and_may_come_again(sent, tmp_path, damage):
    into, file = tmp_path / "store", next(sent[1].glob("second.*"))
    good = file.read_bytes()
    store.receive(sent[0], into)
    damage(file)
    assert refused(sent[1], into).endswith("send part-02 again")
    file.write_bytes(good)
    assert store.receive(sent[1], into) == ["second"]


def test_an_append_that_was_interrupted(sent, tmp_path):
    into = tmp_path / "store"
    store.receive(sent[0], into)
    archive = into / "archives" / "second.tar.xz"
    archive.write_bytes(archive.read_bytes() + b"half of the next piece")
    assert store.receive(sent[1], into) == ["second"]


def test_an_archive_that_is_not_what_was_packed(sent, tmp_path):
    """As when the disk there changes a byte."""
    into = tmp_path / "store"
    store.receive(sent[0], into)
    archive = into / "archives" / "second.tar.xz"
    archive.write_bytes(b"x" + archive.read_bytes()[1:])
    assert "second is damaged" in refused(sent[1], into)
    assert [store.receive(part, into) for part in sent] == [[], ["second"], ["last"]]


def test_parts_of_another_preparation_start_anew_and_keep_results(sent, tmp_path):
    into = tmp_path / "store"
    store.receive(sent[0], into)
    (into / "results.jsonl").write_text("{}\n")
    for part in sent:
        told = json.loads((part / store.MANIFEST).read_text())
        (part / store.MANIFEST).write_text(json.dumps({**told, "commit": "y"}))
    assert "part-01 has not come yet" in refused(sent[1], into)
    assert store.receive(sent[0], into) == ["first"]
    assert (into / "results.jsonl").read_text() == "{}\n"


def test_a_tree_that_fills_an_upload(monkeypatch):
    monkeypatch.setattr(pack, "tree_files", lambda root: [ROOT / "README.md"])
    assert pack.part_bytes(ROOT) == (62 << 20) - (ROOT / "README.md").stat().st_size
    monkeypatch.setattr(pack, "UPLOAD", 2 << 20)
    with pytest.raises(SystemExit, match="leaves no room in an upload of 2 MiB"):
        pack.part_bytes(ROOT)


# steps


def step(name, *codes, limit=20, needs=(), env=None):
    return Step(name, limit, tuple(Attempt(("-c", code), env or {}) for code in codes), needs)


def run(folder, *given, seconds=60, **options):
    runner.run(given, ROOT, folder, seconds, **options)
    return [(line["step"], line["status"]) for line in runner.read(folder)]


OK, FAIL = "print('well')", "import sys; print('bad', file=sys.stderr); sys.exit(3)"


def test_a_failure_is_recorded_and_the_next_step_goes_on(tmp_path):
    back = tmp_path / "back"
    made = run(
        tmp_path, step("a", FAIL), step("b", OK), step("c", OK, needs=("a",)), step("d", OK, needs=("b",)), back=back
    )
    assert made == [("a", "failed"), ("b", "ok"), ("c", "skipped"), ("d", "ok")]
    failed = runner.read(tmp_path)[0]
    assert (failed["rc"], failed["tail"]) == (3, "bad\n")
    assert runner.read(back) == runner.read(tmp_path)
    assert "a " in runner.report(back / runner.RESULTS) and "bad" in runner.report(back / runner.RESULTS)


def test_what_succeeded_is_not_run_again_and_what_failed_is(tmp_path):
    run(tmp_path, step("a", OK), step("b", FAIL))
    shutil.rmtree(tmp_path / "logs")
    back = tmp_path / "back"
    assert run(tmp_path, step("a", FAIL), step("b", OK), back=back)[2:] == [("b", "ok")]
    assert len(runner.read(back)) == 3  # with those of the earlier command
    assert run(tmp_path, step("a", OK), again=True)[3:] == [("a", "ok")]


def test_what_was_never_tried_comes_before_what_failed(tmp_path):
    run(tmp_path, step("a", FAIL), step("b", FAIL))
    made = run(tmp_path, step("a", OK), step("b", OK), step("c", OK), step("d", OK, needs=("a",)))
    assert made[2:] == [("a", "ok"), ("c", "ok"), ("d", "ok"), ("b", "ok")]


def test_what_an_attempt_needed_holds_for_the_steps_after_it(tmp_path):
    probe = "import os, sys; sys.exit(os.environ.get('KIT_PROBE') != 'found')"
    with_env = Step("a", 20, (Attempt(("-c", probe)), Attempt(("-c", probe), {"KIT_PROBE": "found"})))
    assert run(tmp_path, with_env) == [("a", "failed"), ("a", "ok")]
    assert run(tmp_path, step("b", probe))[2:] == [("b", "ok")]  # in another command too


def test_a_stand_in_is_replaced_when_it_can_be(tmp_path):
    """The miniature, begun in the background before onnxruntime has come, is the embedded bundle; then it is exported."""
    wanted = "import pathlib, sys; sys.exit(not pathlib.Path('has-come').exists())"
    instead = "import os; open(os.environ['GPU_KIT_RESULT'], 'w').write('{\"embedded\": true}')"
    miniature = step("a", wanted, instead)
    assert run(tmp_path, miniature) == [("a", "failed"), ("a", "ok")]
    assert run(tmp_path, miniature)[2:] == [("a", "failed"), ("a", "ok")]
    (tmp_path / "work" / "has-come").touch()
    assert run(tmp_path, miniature)[4:] == [("a", "ok")]
    assert run(tmp_path, miniature)[5:] == []


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path):
    child = "import time; time.sleep(100)"
    hang = f"import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); print(c.pid, flush=True); time.sleep(100)"
    assert run(tmp_path, step("a", hang, limit=15), step("b", OK)) == [("a", "timeout"), ("b", "ok")]
    line = runner.read(tmp_path)[0]
    assert 15 <= line["seconds"] < 60
    assert gone(int(line["tail"]))


def gone(pid):
    for _ in range(100):
        try:
            if " Z " in Path(f"/proc/{pid}/stat").read_text().replace(")", " "):
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_step_is_left_for_the_next_command_when_the_time_is_up(tmp_path, capsys):
    assert run(tmp_path, step("a", OK), seconds=5) == []
    assert "a: left for the next command" in capsys.readouterr().out


def test_numbers_of_a_step_that_was_killed_are_kept(tmp_path):
    code = "import os, time; open(os.environ['GPU_KIT_RESULT'], 'w').write('{\"rows\": []}'); time.sleep(100)"
    run(tmp_path, step("a", code, limit=15))
    assert runner.read(tmp_path)[0]["result"] == {"rows": []}


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path):
    """kill -9 in the middle of a step: what was done is kept, the step's process ends, and the rest runs."""
    code = (
        "import sys; from pathlib import Path; from vega_edge.benchmarks.gpu_kit import runner, steps\n"
        "made = [steps.Step(n, 60, (steps.Attempt(('-c', c)),)) for n, c in (('a', 'pass'), ('b', 'import time; time.sleep(60)'))]\n"
        "runner.run(made, Path(sys.argv[1]), Path(sys.argv[2]), 100)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT.parent)}
    )
    file = tmp_path / "work" / "b.pid"
    deadline = time.monotonic() + 60
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    inner = int(file.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (tmp_path / runner.RESULTS).open("a") as torn:
        torn.write('{"step": "b", "sta')  # the line it was writing
    assert run(tmp_path, step("a", FAIL), step("b", OK)) == [("a", "ok"), ("b", "ok")]
    assert gone(inner)


def test_a_step_that_runs_in_the_background_is_waited_for(tmp_path):
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(2)\n"
        'open(sys.argv[2], \'a\').write(\'{"step": "a", "status": "ok"}\\n\')'
    )
    (tmp_path / "work").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "work" / "a.lock"), str(tmp_path / runner.RESULTS)],
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    assert run(tmp_path, step("a", FAIL)) == [("a", "ok")]  # the other's result, and no second run
    process.wait()
    process.stdout.close()


def test_wheels_are_of_the_versions_that_are_pinned():
    """Of the packages that both have; what only the GPU machine lacks is pinned nowhere."""
    lines = (ROOT / "pins" / "main.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(re.findall(r"([\w.-]+)==([\w.+]+)", "\n".join(lines)))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    both = 0
    for wanted in (each for archive in wheels.WHEELS.values() for each in archive):
        name, version = wanted.lower().replace("_", "-").split("==")
        both += name in pinned
        assert pinned.get(name, version) == version
    assert both > 5


@pytest.mark.parametrize("small", [False, True])
def test_the_table_of_steps(small):
    made = steps.all_steps(small)
    names = [step.name for step in made]
    assert len(set(names)) == len(names)
    for i, each in enumerate(made):
        assert set(each.needs) <= set(names[:i])  # what a step needs comes before it
        assert 0 < each.limit < 600
        for attempt in each.attempts:
            assert attempt.words[:2] == ("-m", steps.WORK) and attempt.words[2] in work.WORK
    assert next(step.name for step in steps.chosen(["warm", "session"], made)) == "session"
    with pytest.raises(SystemExit, match="there is no step nothing"):
        steps.chosen(["nothing"], made)


# the rehearsal


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """Parts of made-up wheels, as large as an upload allows, prepared below the working tree as the real ones are."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the working tree's size is that of what git lists, and this is no checkout")
    folder = Path("build") / f"gpu-kit-rehearsal-{os.getpid()}"
    made = {"peers": ("kitpeer==1.0",), "onnxruntime-gpu": ("kitruntime==1.0",), "tensorrt-rtx": ("kitrtx==1.0",)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(wheels, "WHEELS", made)
        for archive, (wanted,) in made.items():
            name = wanted.partition("==")[0]
            size = pack.part_bytes(ROOT) + 2 * pack.SLACK if name == "kitruntime" else 1000
            wheel(folder / "wheels" / archive, name, **{f"{name}____init__.py": b"", f"{name}__data": noise(size)})
        prepare.prepare(ROOT, folder, preset=0)
        yield folder
    shutil.rmtree(ROOT / folder)


class Machine:
    """A GPU machine of a folder: takes uploads up to the limit, keeps ignored files between commands, and ends a command
    at its limit. Its Python is a bare environment with `packages` alone."""

    def __init__(self, folder, packages):
        self.root, self.out, self.python = folder / "checkout", folder / "out", folder / "python"
        venv.create(self.python, symlinks=True)
        site = next((self.python / "lib").glob("python*/site-packages"))
        (site / "machine.pth").write_text("\n".join(map(str, packages)))

    def call(self, call, limit=64 << 20):
        carried = [ROOT / each for each in call.carry]
        files = [*pack.tree_files(ROOT), *(f for each in carried for f in each.rglob("*") if f.is_file())]
        size = sum(file.stat().st_size for file in files)
        if size > limit:
            raise ValueError(f"the upload takes {size} bytes, more than {limit}")
        for file in files:
            place = self.root / file.relative_to(ROOT)
            if not place.is_file() or place.stat().st_mtime_ns != file.stat().st_mtime_ns:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, place)
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VEGA_EDGE"))}
        environment |= {"PATH": f"{self.python / 'bin'}:/usr/bin:/bin", "GPU_KIT_DEVICE": "cpu", "BACK": str(self.out)}
        return subprocess.run(
            ["bash", "-c", call.command],
            cwd=self.root,
            env=environment,
            timeout=call.limit,
            capture_output=True,
            text=True,
        )

    @property
    def store(self):
        return self.root / "build" / "gpu-store"

    def last(self, name):
        return [line for line in runner.read(self.store) if line["step"] == name][-1]


def planned(kit):
    manifest = json.loads((ROOT / kit / "part-01" / store.MANIFEST).read_text())
    return calls.calls(manifest, kit.as_posix(), "$BACK")


def test_parts_that_no_longer_fit_beside_the_tree_have_to_be_prepared_again(kit, monkeypatch):
    largest = max(
        sum(file.stat().st_size for file in part.iterdir()) for part in kit.iterdir() if part.name.startswith("part")
    )
    for room, fits in ((largest - pack.SLACK, True), (largest - pack.SLACK - 1, False)):
        monkeypatch.setattr(pack, "part_bytes", lambda root, room=room: room)
        if fits:
            assert "limit" in prepare.commands(ROOT, kit, "")
        else:
            with pytest.raises(SystemExit, match="no longer fits an upload"):
                prepare.commands(ROOT, kit, "")


def test_commands_fit_the_machine(kit):
    made = planned(kit)
    carried = [folder for call in made for folder in call.carry]
    assert carried == [f"{kit}/part-{n:02}" for n in range(1, len(carried) + 1)]
    assert len(carried) == 3  # the second archive does not fit in one; the last comes alone
    assert all(len(call.command) < 2000 and call.limit <= 600 for call in made)
    assert "receive" not in made[2].command and "run rtx" in made[-1].command
    assert calls.told(made).count("limit") == len(made)


def test_more_than_an_upload_is_refused(kit, tmp_path):
    machine = Machine(tmp_path, [])
    with pytest.raises(ValueError, match="the upload takes"):
        machine.call(planned(kit)[0], limit=64_000_000)
    assert not machine.root.exists()
    too_much = calls.Call("true", 10, (f"{kit}/part-01", f"{kit}/part-02"), 0)
    with pytest.raises(ValueError, match="the upload takes"):
        machine.call(too_much)


def test_a_machine_that_lacks_almost_everything(kit, tmp_path):
    """No torch, no pytest: imports, exports and tests fail. What can be measured is, with the embedded bundle."""
    import importlib.util

    packages = tmp_path / "packages"
    packages.mkdir()
    for name in (
        "numpy",
        "numpy.libs",
        "onnxruntime",
        "tokenizers",
        "PIL",
        "pillow.libs",
        "tqdm",
        "huggingface_hub",
        "packaging",
        "flatbuffers",
        "google",
    ):
        found = importlib.util.find_spec(name) if "." not in name else None
        places = list(found.submodule_search_locations) if found else [str(Path(np.__file__).parent.parent / name)]
        if Path(places[0]).exists():
            (packages / name).symlink_to(places[0])
    machine = Machine(tmp_path, [packages])
    made = planned(kit)
    skipped = machine.call(made[1])  # the second part first
    assert skipped.returncode == 1
    assert "part-01 has not come yet" in skipped.stderr
    for call in made:
        done = machine.call(call)
        assert "Traceback" not in done.stderr, done.stderr
    assert store.complete(machine.store) == {"peers", "onnxruntime-gpu", "tensorrt-rtx"}
    assert (machine.store / "site" / "kitruntime" / "data").stat().st_size > 1 << 20
    lines = runner.read(machine.store)
    first, second = (line for line in lines if line["step"] == "imports")
    assert (first["status"], second["status"]) == ("failed", "ok")
    assert "ModuleNotFoundError" in second["result"]["faults"]["torch"]
    assert machine.last("session")["status"] == "ok"
    assert (machine.last("miniature")["status"], machine.last("miniature")["words"]) == ("ok", ["embedded"])
    assert machine.last("forms")["result"]["unet_s"]["plain, cpu"] > 0
    assert machine.last("export-vegart")["status"] == machine.last("tests")["status"] == "failed"
    assert machine.last("vegart-1024")["why"] == "needs export-vegart"
    assert machine.last("tensorrt-rtx")["status"] == "ok"  # its answer is recorded, whatever it is
    assert "ModuleNotFoundError" in machine.last("tensorrt-rtx")["result"]["version"]
    assert runner.read(machine.out) == lines  # the last command brought all of them back
    assert not list((machine.store / "work").glob("*.pid"))


@IN_FULL
@pytest.mark.full
def test_the_run_from_end_to_end(kit, tmp_path):
    """Everything the machine has, and what the parts bring; minutes, since two models are exported and all is drawn."""
    for package in ("torch", "diffusers", "transformers", "onnxscript"):
        pytest.importorskip(package)
    machine = Machine(tmp_path, [Path(np.__file__).parent.parent])
    outputs = [machine.call(call) for call in planned(kit)]
    again = calls.Call(f"{calls.KIT} run --seconds 500", 590, (), 0)
    for _ in range(8):  # a CPU takes longer than the GPU machine is there
        outputs.append(machine.call(again))
        if "left for the next command" not in outputs[-1].stdout:
            break
    states = {line["step"]: line["status"] for line in runner.read(machine.store)}
    failed = {
        name: machine.last(name)
        for name, state in states.items()
        if state != "ok" and not name.startswith(("warm", "max-"))
    }
    assert not failed, outputs[-1].stdout
    assert {step.name for step in steps.all_steps(small=True) if step.group in ("main", "exports", "rtx")} <= set(
        states
    )
