"""What does the command line do with a job?"""

import json
import subprocess
import sys

import pytest

from chatlearn_vllm.cli.main import main
from chatlearn_vllm.version import __version__

JOB = """
models: {{m: {{num_gpu: 2}}}}
runtime: {{entry_script: {script}}}
"""
SCRIPT = """
import json, pathlib, sys
import beside
pathlib.Path(sys.argv[2]).with_suffix(".out").write_text(json.dumps([__name__, *sys.argv]))
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job whose script writes down how it was started."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry/run.py").write_text(SCRIPT)
    (tmp_path / "entry/beside.py").write_text("")
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(script="entry/run.py"))
    return path


def test_launch_runs_the_script_as_python_would(job):
    assert main(["launch", str(job), "runtime.num_episode=3", "runtime.seed=1"]) == 0
    script = str(job.parent / "entry/run.py")
    assert json.loads(job.with_suffix(".out").read_text()) == [
        "__main__", script, "-c", str(job), "runtime.num_episode=3", "runtime.seed=1",
    ]  # fmt: skip


def test_launch_tells_what_the_user_can_set_right_in_a_line(job, capsys):
    script = job.parent / "entry/run.py"
    script.write_text("from chatlearn_vllm.config import UserError; raise UserError('set n: 2')")
    assert main(["launch", str(job)]) == 2
    assert capsys.readouterr().err == "set n: 2\n"
    script.write_text("raise ValueError('a fault of the script')")
    with pytest.raises(ValueError, match="a fault of the script"):
        main(["launch", str(job)])


def test_a_launch_of_nothing_asks_for_the_file_alone(capsys):
    with pytest.raises(SystemExit):
        main(["launch"])
    assert capsys.readouterr().err.endswith("the following arguments are required: JOB.yaml\n")


def test_an_interrupted_launch_ends_with_a_line(job, capsys):
    (job.parent / "entry/run.py").write_text("raise KeyboardInterrupt")
    assert main(["launch", str(job)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_has_enough_of_the_output_is_no_error(job):
    command = f"{sys.executable} -m chatlearn_vllm.cli.main plan {job} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (len(done.stdout), done.stderr) == (1, "")


def test_launch_finds_the_script_in_the_current_directory(job, monkeypatch, tmp_path):
    (tmp_path / "sub").mkdir()
    moved = job.rename(tmp_path / "sub/job.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["launch", str(moved)]) == 0
    assert moved.with_suffix(".out").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("null", "job.yaml: runtime.entry_script: must name the Python script that runs the job"),
        ("no.py", "job.yaml: runtime.entry_script='no.py': no such file"),
    ],
)
def test_launch_needs_a_script(job, capsys, script, message):
    job.write_text(JOB.format(script=script))
    assert main(["launch", str(job)]) == 2
    assert message in capsys.readouterr().err


def test_a_bad_job_is_a_message_and_not_a_traceback(job, capsys):
    assert main(["launch", str(job), "runtime.num_epsiode=3"]) == 2
    captured = capsys.readouterr()
    assert "did you mean num_episode?" in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "serve DIR --max-model-len 8192 --trust-remote-code",
            "--max-model-len 8192 --trust-remote-code: flags of `vllm serve` come last, after --: "
            "serve CKPT -- --max-model-len 8192 --trust-remote-code",
        ),
        (
            "bench vllm --gpu-memory-utilisation=0.8",
            "--gpu-memory-utilisation=0.8: bench takes no such argument; see chatlearn-vllm bench "
            "--help",
        ),
    ],
)
def test_an_argument_that_a_command_does_not_take_is_told_with_what_to_do(
    arguments, message, capsys
):
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert message in capsys.readouterr().err


def test_plan_draws_the_placement_and_tells_the_notices(job, capsys):
    assert main(["plan", str(job), "models.m.model_args.max_paddings=3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("device  share  m\n0       1/1    0.0\n1       1/1    1.0\n")
    assert "note: models.m: no effect of max_paddings=3" in out


def test_help_imports_nothing_heavy():
    code = """
import sys
from chatlearn_vllm.cli.main import main
try:
    main(["--help"])
except SystemExit as end:
    heavy = ("torch", "ray", "vllm", "megatron", "pydantic", "yaml", "transformers", "numpy")
    print(end.code, [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "launch" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"chatlearn-vllm {__version__}"
