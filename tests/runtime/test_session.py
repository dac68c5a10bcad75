"""How does a script say which job it runs?"""

import subprocess
import sys

import pytest

from chatlearn_vllm.config import ConfigError
from chatlearn_vllm.runtime import session
from tests.helpers.toy_modules import ToyReward, write_job

SCRIPT = """
import sys
from chatlearn_vllm.runtime.session import current_job, init
init()
print(current_job().runtime.num_episode)
assert "ray" not in sys.modules and "torch" not in sys.modules
"""


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True
    )


def test_modules_take_the_job_of_init(tmp_path):
    job = session.init(str(write_job(tmp_path)), ["runtime.num_episode=7"])

    assert session.current_job() is job
    assert ToyReward("reward").runtime_args.num_episode == 7


def test_errors_of_a_given_config_are_raised(tmp_path):
    with pytest.raises(ConfigError, match="num_episod"):
        session.init(str(write_job(tmp_path)), ["runtime.num_episod=7"])


def test_a_script_takes_config_and_overrides_from_its_command_line(tmp_path):
    run = run_script("runtime.seed=3", "-c", str(write_job(tmp_path)), "runtime.num_episode=9")

    assert (run.returncode, run.stdout.strip()) == (0, "9"), run.stderr


def test_a_script_with_a_bad_config_ends_with_a_message_and_no_traceback(tmp_path):
    run = run_script("-c", str(write_job(tmp_path)), "runtime.num_episod=9")

    assert run.returncode == 2
    assert "num_episode" in run.stderr
    assert "Traceback" not in run.stderr
