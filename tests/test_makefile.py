"""The Makefile: every target resolves, the graph reruns what it must and nothing else, and help shows all of it."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, clean_environment

TEXT = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z][a-z-]+):.*##", TEXT, re.M)
STAGES = re.search(r"^STAGES := (.*)$", TEXT, re.M)[1].split()


def make(*words, cwd=ROOT, env=None):
    return subprocess.run(["make", *words], cwd=cwd, capture_output=True, text=True, env=clean_environment() | (env or {}))


@pytest.fixture
def tree(tmp_path):
    """A copy of the repository's outside: Makefile, recipes, scripts, samples; all stages marked done, oldest first."""
    for name in ("Makefile", "env.sh", "recipes", "scripts", "patches", "requirements.txt", "requirements-cpu.txt", "data/sample"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1_000_000, 1_000_000))
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/stamp.json").touch()
    for age, stage in enumerate([*STAGES, "pretrain-hf"]):
        manifest = tmp_path / f"data/out/demo/{stage}/manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text('{"seconds": 1, "peak_rss_bytes": 1, "summary": "s"}')
        os.utime(manifest, (2_000_000 + age, 2_000_000 + age))
    return tmp_path


def stages_to_run(tree, *words):
    """Return the stages that `make -n all` would run, in order."""
    answer = make("-n", "all", *words, cwd=tree)
    assert answer.returncode == 0, answer.stderr
    return re.findall(r'^echo "== ([\w-]+)"', answer.stdout, re.M)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_resolves_without_a_warning(target, tree):
    answer = make("-n", "--warn-undefined-variables", target, cwd=tree)
    assert answer.returncode == 0, answer.stderr
    assert "undefined variable" not in answer.stderr


def test_help_shows_every_target_and_every_variable_and_fits_a_screen():
    lines = make("help").stdout.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("  ")} == set(TARGETS) | set(re.findall(r"^([A-Z0-9]+) \?=", TEXT, re.M))
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    assert re.search(r"^  RECIPE +demo ", "\n".join(lines), re.M)


def test_nothing_to_do_after_a_run(tree):
    assert stages_to_run(tree) == []
    for stage in STAGES:
        if stage != "ask":
            assert make("-q", stage, cwd=tree).returncode == 0, stage


@pytest.mark.parametrize(
    ("touched", "expected"),
    [
        ("recipes/demo/ask.yaml", ["ask"]),
        ("recipes/demo/kb.yaml", ["kb", "ask"]),
        ("recipes/demo/sft.yaml", ["sft", "ask"]),
        ("recipes/demo/convert.yaml", ["convert", "serve-pretrained"]),
        ("recipes/demo/pretrain.yaml", ["pretrain", "convert", "serve-pretrained"]),
        ("recipes/demo/dedup.yaml", ["dedup", "tokenizer", "tokens", "pretrain", "convert", "serve-pretrained"]),
        ("data/sample/errors/records.jsonl", ["kb", "ask"]),
        ("data/sample/sft/alpaca.json", ["sft-data", "sft", "ask"]),
        ("scripts/dedup_text.py", []),
        (".venv/stamp.json", []),
    ],
)
def test_a_touched_file_reruns_its_stage_and_those_after_it(tree, touched, expected):
    assert (tree / touched).exists()
    os.utime(tree / touched)
    assert stages_to_run(tree) == expected


def test_eval_serves_again_only_what_has_changed(tree):
    def served(*touched):
        for age, name in enumerate(("eval-before", "eval-after", "eval")):
            manifest = tree / f"data/out/demo/{name}/manifest.json"
            manifest.parent.mkdir(exist_ok=True)
            manifest.write_text("{}")
            os.utime(manifest, (3_000_000 + age, 3_000_000 + age))
        for name in touched:
            os.utime(tree / name)
        answer = make("-n", "eval", cwd=tree)
        assert answer.returncode == 0 and "--before data/out/demo/eval-before --after data/out/demo/eval-after" in answer.stdout
        return re.findall(r'^echo "== ([\w-]+)"', answer.stdout, re.M)

    assert served() == []
    assert served("data/sample/eval/json.jsonl") == ["eval-before", "eval-after"]
    os.utime(tree / "data/sample/eval/json.jsonl", (1_000_000, 1_000_000))
    assert served("recipes/demo/sft.yaml") == ["sft", "eval-after"]
    os.utime(tree / "recipes/demo/sft.yaml", (1_000_000, 1_000_000))
    assert "--model Qwen/Qwen3-8B " in make("-n", "eval", "MODEL=Qwen/Qwen3-8B", cwd=tree).stdout


def test_the_second_engine_takes_the_place_of_the_first(tree):
    os.utime(tree / "recipes/demo/pretrain-hf.yaml")
    assert stages_to_run(tree, "ENGINE=hf") == ["pretrain-hf", "serve-pretrained"]


def test_data_is_generated_only_when_asked_for(tree):
    os.utime(tree / "recipes/demo/templates/qa.jinja")
    assert stages_to_run(tree) == []
    text = make("-n", "sft-gen", "GPUS=6,7", cwd=tree).stdout
    assert "serve_vllm.py --config recipes/demo/serve.yaml --port 8051 --gpus 6,7" in text
    assert "--model data/out/demo/base-model --served-model-name base-model --then" in text
    assert "generate_sft_data.py --config recipes/demo/sft-gen.yaml --output data/out/demo/sft-gen --overwrite" in text


def test_gpus_and_model_reach_the_server(tree):
    answer = make("-n", "serve", "GPUS=6,7", "MODEL=Qwen/Qwen3-14B", "PORT=9000", cwd=tree)
    assert "--gpus 6,7" in answer.stdout
    assert "--model Qwen/Qwen3-14B" in answer.stdout
    assert "--port 9000" in answer.stdout


def test_a_server_in_the_background_is_the_same_server(tree):
    words = ["GPUS=6,7", "MODEL=Qwen/Qwen3-14B", "PORT=9000"]
    front, back = (make("-n", target, *words, cwd=tree).stdout for target in ("serve", "serve-up"))
    assert back == front.replace("serve_vllm.py run ", "serve_vllm.py up ")
    for action in ("status", "logs", "down"):
        assert make("-n", f"serve-{action}", "PORT=9000", cwd=tree).stdout.strip().endswith(f"serve_vllm.py {action} --port 9000")


def test_gpus_reach_every_stage_through_env_sh(tmp_path):
    answer = subprocess.run(
        ["bash", "-c", "source env.sh; echo $CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER"],
        cwd=ROOT, capture_output=True, text=True, env={"PATH": os.environ["PATH"], "GPUS": "6,7"},
    )  # fmt: skip
    assert answer.stdout.split() == ["6,7", "PCI_BUS_ID"]


def test_env_sh_fills_only_what_is_unset():
    variables = re.findall(r"^export (\w+)=", (ROOT / "env.sh").read_text(encoding="utf-8"), re.M)
    given = dict.fromkeys(variables, "mine")
    answer = subprocess.run(
        ["bash", "-c", "source env.sh; env"], cwd=ROOT, capture_output=True, text=True, env=given | {"PATH": os.environ["PATH"]}
    )
    values = dict(line.partition("=")[::2] for line in answer.stdout.splitlines())
    assert {name: values[name] for name in variables} == given


def test_a_missing_recipe_is_one_sentence(tree):
    answer = make("dedup", "RECIPE=nobody", cwd=tree)
    assert answer.returncode == 2
    assert "recipes/nobody/" in answer.stderr
    assert "copy recipes/demo/" in answer.stderr


def test_no_variable_changes_an_output_unseen():
    """Stage lines take paths and MODEL from Make; every other setting comes from the recipe."""
    for line in re.findall(r"^\t\$\(call run,.*$", TEXT, re.M):
        flags = set(re.findall(r"--[a-z-]+", line))
        assert flags <= {"--input", "--tokenizer", "--model", "--data"}, line


def test_a_recipe_that_mixes_folders_of_tokens_names_them(tree):
    """Its maps are prerequisites by time; a recipe that names none trains on the tokens of the stage before."""
    recipe = tree / "recipes/demo/pretrain.yaml"
    assert "--input data/out/demo/tokens --tokenizer data/out/demo/tokenizer" in make("-n", "pretrain-plan", cwd=tree).stdout
    for name in ("web", "books"):
        (tree / "maps" / name).mkdir(parents=True)
        (tree / "maps" / name / "train.npy").touch()
    for path in (tree / "maps").rglob("*"):
        os.utime(path, (1_000_000, 1_000_000))
    recipe.write_text("input: [maps/web, maps/books]\ntokenizer: maps/tokenizer\n" + recipe.read_text(encoding="utf-8"), encoding="utf-8")
    os.utime(recipe, (1_000_000, 1_000_000))
    assert "--input data" not in make("-n", "pretrain-plan", cwd=tree).stdout
    assert stages_to_run(tree) == []
    os.utime(tree / "maps/books/train.npy")
    assert stages_to_run(tree)[0] == "pretrain"
