"""The closing table: every finished stage in the pipeline's order, columns aligned also for Chinese text."""

import json


def finish(folder, name, **fields):
    (folder / name).mkdir(parents=True)
    (folder / name / "manifest.json").write_text(json.dumps({"seconds": 1.6, "peak_rss_bytes": 2_000_000, "summary": name} | fields))


def test_rows_come_in_the_order_given_then_by_name(run_script, tmp_path):
    for name in ("zeta", "dedup", "clean-text", "alpha", "dedup.old-20260101-000000"):
        finish(tmp_path, name)
    answer = run_script("summarize_run.py", "--input", tmp_path, "--stages", "clean-text", "tokens", "dedup")
    assert [line.split()[0] for line in answer.stdout.splitlines()[2:]] == ["clean-text", "dedup", "alpha", "zeta"]
    assert answer.stdout.splitlines()[2].split()[1:3] == ["2", "2"]


def test_columns_align_with_wide_characters(load_script):
    module = load_script("summarize_run.py")
    lines = module.table([["a", "b"], ["中文", "x"], ["abcd", "y"]])
    assert {module.width(line) for line in lines[2:]} == {7}


def test_nothing_finished_and_a_broken_manifest_are_one_sentence(run_script, tmp_path):
    answer = run_script("summarize_run.py", "--input", tmp_path)
    assert answer.returncode == 1
    assert "no finished stage" in answer.stderr
    finish(tmp_path, "kb")
    (tmp_path / "kb/manifest.json").write_text("{")
    answer = run_script("summarize_run.py", "--input", tmp_path)
    assert answer.returncode == 1
    assert "kb/manifest.json" in answer.stderr
    assert "Traceback" not in answer.stderr
