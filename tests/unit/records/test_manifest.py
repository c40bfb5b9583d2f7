import subprocess
import sys

from kvatlas.records import manifest
from kvatlas.records.manifest import collect_manifest


def test_a_manifest_names_versions_and_hardware():
    run = collect_manifest("kvatlas run ttft", seed=7, models={"tiny": {"num_parameters": 10, "source": "random"}})
    assert (run.command, run.seed, run.models["tiny"]["num_parameters"]) == ("kvatlas run ttft", 7, 10)
    assert {"kvatlas", "python", "torch", "transformers", "platform"} <= set(run.versions)
    assert {"cpu_model", "cores", "threads", "memory_bytes", "device"} <= set(run.hardware)
    assert run.hardware["memory_bytes"] > 2**20
    assert run.run_id != collect_manifest("again", seed=7).run_id


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    run = collect_manifest("x", seed=0)
    assert (run.commit, run.commit_dirty) == (None, None)


def test_the_commit_of_a_foreign_checkout_is_not_ours(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(manifest, "_PACKAGE_FOLDER", tmp_path)
    assert manifest._git_state() == (None, None)


def test_the_commit_of_our_checkout_is_found(monkeypatch, tmp_path):
    package = tmp_path / "src" / "kvatlas"
    package.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(manifest, "_PACKAGE_FOLDER", package)
    commit, dirty = manifest._git_state()
    assert len(commit) == 40 and dirty is False
    (tmp_path / "new").touch()
    assert manifest._git_state() == (commit, True)


def test_a_missing_package_is_named_as_such():
    assert manifest._version("kvatlas-no-such-package") == "not installed"


def test_collecting_imports_no_torch():
    code = (
        "import sys; from kvatlas.records.manifest import collect_manifest; import kvatlas.records.store;"
        "collect_manifest('x', 0); print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
