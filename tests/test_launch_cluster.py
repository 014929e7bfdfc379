"""The launchers of clusters, with programs in place of theirs that note each call."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from convnet import cli, main

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("launch/slurm.sbatch", "launch/tpu.sh")
NOTE = """#!{bash}
printf '%s\\n' "{name} $*" >>"{calls}"
{then}
"""


class Cluster:
    """A project and a path on which programs are set up by `program`."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.project = tmp / "my project"
        self.bin = tmp / "bin"
        self.log = tmp / "calls"
        for folder in (self.project / "launch", self.bin):
            folder.mkdir(parents=True)
        for script in SCRIPTS:
            shutil.copy(ROOT / script, self.project / script)
        for tool in "cat dirname gzip mktemp rm sed sleep tar".split():
            (self.bin / tool).symlink_to(shutil.which(tool))

    def program(self, path: Path, then: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        bash = shutil.which("bash")
        path.write_text(
            NOTE.format(bash=bash, name=path.name, calls=self.log, then=then)
        )
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **env: str):
        return subprocess.run(
            [shutil.which("bash"), self.project / script, *arguments],
            env={"PATH": str(self.bin), "HOME": str(self.tmp)} | env,
            cwd=self.tmp,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_can_be_executed(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    subprocess.run(["shellcheck", ROOT / script], check=True)


def submit(cluster, status, *arguments):
    cluster.program(cluster.project / ".venv/bin/python", f"exit {status}")
    # As srun does: it runs what comes after its own options.
    cluster.program(cluster.bin / "srun", 'while [[ $1 == --* ]]; do shift; done; "$@"')
    cluster.program(cluster.bin / "scontrol")
    slurm = {
        "SLURM_SUBMIT_DIR": str(cluster.project),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "32",
    }
    return cluster.run("launch/slurm.sbatch", *arguments, **slurm)


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_slurm_puts_back_what_was_saved_and_nothing_else(cluster, status):
    done = submit(cluster, status, "--config=a b.py", "--workdir=/shared/x")
    assert done.returncode == status, done.stderr
    step, python, *rest = cluster.calls()
    assert step.startswith("srun --label ") and "--cpus-per-task=32" in step
    assert python == "python -P -m convnet.main --config=a b.py --workdir=/shared/x"
    assert rest == (["scontrol requeue 17"] if status == 143 else [])


def test_slurm_without_an_environment_says_how_to_make_it(cluster):
    cluster.program(cluster.bin / "srun")
    slurm = {"SLURM_SUBMIT_DIR": str(cluster.project)}
    done = cluster.run("launch/slurm.sbatch", **slurm)
    assert done.returncode == 2 and "launch/setup.sh" in done.stderr
    assert not cluster.calls()


def test_slurm_options_stand_before_the_first_command():
    head, _, body = (ROOT / SCRIPTS[0]).read_text().partition("\nset -euo pipefail\n")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", head, re.M))
    assert options["ntasks-per-node"] == "1" and "requeue" in options
    assert options["open-mode"] == "append"
    # Without B: it is the tasks that are told.
    assert re.fullmatch(r"TERM@\d+", options["signal"])
    assert "#SBATCH" not in body


GCLOUD = """
case "$*" in
*" describe "*)
    state=$(cat "$HOME/states")
    echo "${state%% *}"
    echo "${state#* }" >"$HOME/states" ;;
*" scp "*) cat "${@:5:1}" >"$HOME/copied.tar.gz" ;;
*" ssh "*" kill"* | *"convnet.main"*)
    for argument in "$@"; do
        case $argument in
        --command=*) cd "$HOME"; exec "$BASH" -c "${argument#*=}" ;;
        esac
    done ;;
esac
"""


@pytest.fixture
def tpu(cluster):
    cluster.program(cluster.bin / "gcloud", GCLOUD)
    return cluster


def test_tpu_create_waits_until_the_slice_is_there(tpu):
    (tpu.tmp / "states").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    made = tpu.run("launch/tpu.sh", "create", TPU_NAME="big", POLL_SECONDS="0")
    assert made.returncode == 0, made.stderr
    create, *polls = tpu.calls()
    assert create.startswith("gcloud compute tpus queued-resources create big ")
    assert "--node-id=big" in create and create.count("--spot") == 1
    assert len(polls) == 3 and all(" describe big " in poll for poll in polls)
    (tpu.tmp / "states").write_text("FAILED")
    options = {"TPU_SPOT": "", "POLL_SECONDS": "0"}
    assert tpu.run("launch/tpu.sh", "create", **options).returncode == 1
    assert "--spot" not in tpu.calls()[4]


def test_tpu_setup_copies_the_project_and_no_environment(tpu):
    (tpu.project / ".venv/bin").mkdir(parents=True)
    (tpu.project / ".venv/bin/python").write_text("large")
    done = tpu.run("launch/tpu.sh", "setup", SHARED="10.0.0.2:/share")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tpu.tmp / "copied.tar.gz") as archive:
        names = archive.getnames()
    assert "./launch/tpu.sh" in names
    assert not any(".venv" in name for name in names)
    text = tpu.log.read_text()
    assert "mount -t nfs 10.0.0.2:/share /shared" in text
    assert "launch/setup.sh tpu" in text


def test_tpu_train_takes_any_flag_and_its_status(tpu):
    program = f'exec "{sys.executable}" -c "import sys; print(sys.argv[1:])" "$@"'
    tpu.program(tpu.tmp / "convnet/.venv/bin/python", program)
    flags = ["--config=it's $HOME.py", '--config.model.widths=(8, "16")']
    done = tpu.run("launch/tpu.sh", "train", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["-P", "-m", "convnet.main", *flags])
    assert (tpu.tmp / "convnet/train.pid").read_text().strip().isdigit()
    tpu.program(tpu.tmp / "convnet/.venv/bin/python", "exit 143")
    assert tpu.run("launch/tpu.sh", "train").returncode == 143


def test_tpu_without_a_verb_shows_its_header(tpu):
    done = tpu.run("launch/tpu.sh")
    assert done.returncode == 2 and not tpu.calls()
    assert done.stdout.startswith("Trains on a slice") and "#" not in done.stdout[:1]


def manifests():
    return list(yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text()))


def test_kubernetes_numbers_and_names_agree():
    claim, jobset = manifests()
    assert (claim["kind"], jobset["kind"]) == ("PersistentVolumeClaim", "JobSet")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (workers,) = jobset["spec"]["replicatedJobs"]
    job, pod = workers["template"]["spec"], workers["template"]["spec"]["template"]
    assert job["completionMode"] == "Indexed"
    (container,) = pod["spec"]["containers"]
    env = {each["name"]: each for each in container["env"]}
    count = int(env["JAX_NUM_PROCESSES"]["value"])
    assert job["parallelism"] == job["completions"] == count
    field = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # JOBSET-JOB-INDEX-POD.SUBDOMAIN is how JobSet names pods.
    host, port = env["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    network = jobset["spec"]["network"]
    name = jobset["metadata"]["name"]
    assert host == f"{name}-{workers['name']}-0-0.{network['subdomain']}"
    assert network["enableDNSHostnames"] is True
    assert container["ports"] == [{"containerPort": int(port)}]
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert set(mounts) == set(volumes)
    shared = volumes["shared"]["persistentVolumeClaim"]
    assert shared["claimName"] == claim["metadata"]["name"]
    workdir = next(x for x in container["args"] if x.startswith("--workdir="))
    assert workdir.removeprefix("--workdir=").startswith(mounts["shared"] + "/")


def test_kubernetes_goes_on_after_a_saved_step_and_ends_at_a_wrong_flag():
    _, jobset = manifests()
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    names = [each["name"] for each in job["template"]["spec"]["containers"]]
    assert [rule["onExitCodes"]["containerName"]] == names
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    # What is no such failure restarts all, which is JobSet's default.
    assert rule["action"] == "FailJobSet" and policy["maxRestarts"] > 0
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_kubernetes_runs_a_command_that_the_app_takes():
    _, jobset = manifests()
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][1:] == ["-P", "-m", "convnet.main"]
    values = cli.parse(["convnet.main", *container["args"]], main.define, "")
    assert values.config.data.name == "imagenet2012"
