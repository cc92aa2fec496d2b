"""The plans in configs/plans say what the papers say, and the catalogue covers them."""

import json
import math
import pathlib
import re

import pytest

PLANS = pathlib.Path(__file__).parents[2] / "configs" / "plans"
BILLION = 1_000_000_000

# MobileLLM-R1, table 3: tokens in billions, shares of the two stages in per cent; and the epochs
# that follow from them to two decimals, in stage 1, stage 2 and both.
PRETRAIN = {
    "starcoder": (263.8, 10.66, 0.52, 0.85, 0.04, 0.89),
    "openwebmath": (12.6, 6.93, 23.33, 11.53, 38.83, 50.36),
    "fineweb_edu": (1300, 63.75, 54.83, 1.03, 0.88, 1.91),
    "wiki": (3.7, 5.03, 0.14, 28.51, 0.79, 29.30),
    "arxiv": (28, 6.36, 1.32, 4.76, 0.99, 5.75),
    "stackexchange": (19.6, 5.03, 0.86, 5.38, 0.92, 6.30),
    "algebraic_stack": (12.6, 2.25, 1.26, 3.74, 2.10, 5.84),
    "nemotron_science": (2, None, 0.03, 0, 0.31, 0.31),
    "nemotron_code": (16, None, 0.72, 0, 0.94, 0.94),
    "nemotron_math": (15, None, 3.01, 0, 4.21, 4.21),
    "cosmopedia": (25, None, 2.70, 0, 2.26, 2.26),
    "natural_reasoning": (1.8, None, 3.18, 0, 37.05, 37.05),
    "finemath": (34, None, 8.01, 0, 4.94, 4.94),
    "pes2o": (50, None, 0.08, 0, 0.03, 0.03),
}

# Table 4: shares of the two stages in per cent.
MIDTRAIN = {
    "dolmino_dclm": (37.03, 6.51),
    "dolmino_flan": (4.10, 0.72),
    "dolmino_pes2o": (11.41, 2.01),
    "dolmino_wiki": (2.66, 0.47),
    "dolmino_stackexchange": (2.12, 2.00),
    "dolmino_math": (11.63, 29.10),
    "nemotron_code_v1": (20.69, 29.10),
    "nemotron_cc_math": (3.45, 19.40),
    "starcoder": (6.90, 9.70),
    "benchmark_train": (None, 0.97),
}

NAMES = ("mobilellm_r1_pretrain", "mobilellm_r1_pretrain_capped", "mobilellm_r1_midtrain")


def read(name):
    return json.loads((PLANS / f"{name}.json").read_text())


def shares(stage):
    """The weights of a stage as printed: per cent, two decimals."""
    return {name: round(100 * weight, 6) for name, weight in stage["weights"].items()}


def entries():
    return {entry["name"]: entry for entry in read("sources")["sources"]}


def test_every_plan_of_the_directory_is_tested():
    found = {path.stem for path in PLANS.glob("*.json")}
    assert found == {*NAMES, "mobilellm_r1_tiny_pretrain", "mobilellm_r1_tiny_midtrain", "sources"}


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_of_version_2_and_not_tied_to_data(name):
    plan = read(name)
    assert plan["version"] == 2
    assert plan["tokenizer"]["fingerprint"] == ""
    assert "2509.24945" in plan["provenance"]["paper"]
    names = [source["name"] for source in plan["sources"]]
    assert len(set(names)) == len(names)
    for source in plan["sources"]:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", source["name"])
        assert source["path"] == source["name"]
        assert source["tokens"] is None or source["tokens"] > 0
    for stage in plan["stages"]:
        assert set(stage["weights"]) <= set(names)
        assert min(stage["weights"].values()) > 0
    assert set(names) == {n for stage in plan["stages"] for n in stage["weights"]}


def test_pretraining_is_the_papers_table():
    plan = read("mobilellm_r1_pretrain")
    tokens = {source["name"]: source["tokens"] for source in plan["sources"]}
    assert tokens == {name: round(row[0] * BILLION) for name, row in PRETRAIN.items()}
    assert sum(tokens.values()) == 1_784_100_000_000
    for i, stage in enumerate(plan["stages"]):
        assert shares(stage) == {n: row[1 + i] for n, row in PRETRAIN.items() if row[1 + i]}
    assert [len(stage["weights"]) for stage in plan["stages"]] == [7, 14]


def test_midtraining_is_the_papers_table():
    plan = read("mobilellm_r1_midtrain")
    for i, stage in enumerate(plan["stages"]):
        assert shares(stage) == {n: row[i] for n, row in MIDTRAIN.items() if row[i]}
    unknown = [source["name"] for source in plan["sources"] if source["tokens"] is None]
    assert unknown == ["benchmark_train"]


@pytest.mark.parametrize(
    ("name", "steps", "rows", "row_length", "total"),
    [
        ("mobilellm_r1_pretrain", 500_000, 2048, 2048, 4_194_304_000_000),
        ("mobilellm_r1_midtrain", 50_000, 512, 4096, 209_715_200_000),
    ],
)
def test_stages_have_the_published_lengths(name, steps, rows, row_length, total):
    stages = read(name)["stages"]
    assert [stage["tokens"] for stage in stages] == 2 * [steps * rows * row_length]
    assert sum(stage["tokens"] for stage in stages) == total


@pytest.mark.parametrize(
    ("name", "sums"),
    [("mobilellm_r1_pretrain", (1.0001, 0.9999)), ("mobilellm_r1_midtrain", (0.9999, 0.9998))],
)
def test_weights_sum_to_what_the_printed_columns_sum_to(name, sums):
    found = [math.fsum(stage["weights"].values()) for stage in read(name)["stages"]]
    assert found == pytest.approx(sums, abs=1e-9)


def test_epochs_follow_from_shares_and_tokens():
    """No table of the paper prints epochs: 50.4 of OpenWebMath and 29.3 of Wikipedia are implied."""
    plan = read("mobilellm_r1_pretrain")
    for source in plan["sources"]:
        found = [
            stage["weights"].get(source["name"], 0) * stage["tokens"] / source["tokens"]
            for stage in plan["stages"]
        ]
        for epochs, told in zip((*found, sum(found)), PRETRAIN[source["name"]][3:], strict=True):
            assert epochs == pytest.approx(told, rel=0.005, abs=0.006), source["name"]


def test_the_capped_plan_differs_in_nothing_but_its_caps():
    plain, capped = read("mobilellm_r1_pretrain"), read("mobilellm_r1_pretrain_capped")
    assert {source.pop("max_epochs") for source in plain["sources"]} == {None}
    assert {source.pop("max_epochs") for source in capped["sources"]} == {4}
    del plain["provenance"], capped["provenance"]
    assert plain == capped


def test_caps_leave_enough_to_read():
    plan = read("mobilellm_r1_pretrain_capped")
    tokens = {source["name"]: 4 * source["tokens"] for source in plan["sources"]}
    for stage in plan["stages"]:
        assert sum(tokens[name] for name in stage["weights"]) > stage["tokens"]
    assert sum(tokens.values()) > sum(stage["tokens"] for stage in plan["stages"])


@pytest.mark.parametrize("name", NAMES)
def test_the_catalogue_has_every_source_of_a_plan(name):
    paper = "mobilellm_r1/"
    for stage in read(name)["stages"]:
        for source in stage["weights"]:
            assert paper + stage["name"] in entries()[source]["used_in"]


def test_the_catalogue_knows_no_stage_that_a_plan_lacks():
    stages = {
        f"mobilellm_r1/{stage['name']}": set(stage["weights"])
        for name in ("mobilellm_r1_pretrain", "mobilellm_r1_midtrain")
        for stage in read(name)["stages"]
    }
    parts = {name for name in entries() if name.endswith("_train")} - {"benchmark_train"}
    for name, entry in entries().items():
        for used in set(entry["used_in"]) & set(stages):
            assert name in stages[used] | parts


def test_entries_of_the_catalogue_have_all_fields():
    catalogue = read("sources")
    names = [entry["name"] for entry in catalogue["sources"]]
    assert len(set(names)) == len(names)
    for entry in catalogue["sources"]:
        assert list(entry) == list(catalogue["fields"])
        assert re.fullmatch(r"[a-z][a-z0-9_]*", entry["name"])
        assert entry["used_in"] and isinstance(entry["gated"], bool)
        assert set(entry["unverified"]) <= set(catalogue["fields"])
        # Either there is something to fetch and a licence, or a note says why not.
        assert entry["notes"] or (entry["download"] and entry["licence"])
    papers = {used.split("/")[0] for entry in catalogue["sources"] for used in entry["used_in"]}
    assert papers == {"mobilellm", "mobilellm_r1", "adapt_pruner", "efficientllm"}


def test_commands_of_the_catalogue_fit_its_fields():
    for entry in entries().values():
        name, prepare, download = entry["name"], entry["prepare"], entry["download"]
        if prepare:
            chat = any("/sft_" in used for used in entry["used_in"])
            assert f"--{'chat' if chat else 'source'}={name}='{entry['files']}' " in prepare
            key = "messages_key" if chat else "text_key"
            assert f" --{key}={entry['text_key']} " in prepare
            assert (" --id_key=" in prepare) == (entry["id_key"] is not None)
            assert re.search(r" --tokenizer=\S+ --row_length=\d+ --out=\S+$", prepare)
        if download and download.startswith("hf "):
            assert download.startswith(f"hf download {entry['hub']} ")
            assert "--repo-type=dataset" in download


def test_adapt_pruners_sets_have_its_number_of_samples_together():
    rows = [e["rows"] for e in entries().values() if e["used_in"] == ["adapt_pruner/train"]]
    assert len(rows) == 9 and sum(rows) == 7_714_363
