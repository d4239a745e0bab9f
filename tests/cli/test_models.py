"""``vitkd models``: the table, one model, JSON, and what matches nothing."""

from __future__ import annotations

import json

import pytest


def test_a_table_of_what_matches(cli):
    code, out, _ = cli("models", "deit3_small")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()[:1] and "deit3_small" in line}
    assert set(rows) == {"deit3_small_patch16_224", "deit3_small_patch16_384"}
    assert "83.08" in rows["deit3_small_patch16_224"] and "384" in rows["deit3_small_patch16_224"]
    assert cli("models", "deit3_small*")[1] == cli("models", "DeiT3-Small")[1] == out


def test_all_about_one(cli):
    code, out, _ = cli("models", "swin_tiny_patch4_window7_224")
    assert code == 0
    for words in ("96, 192, 384, 768", "56, 28, 14, 7", "10 windows, 2 tokens", "ms_in22k_ft_in1k", "81.38"):
        assert words in out


def test_json_has_every_fact(cli):
    code, out, _ = cli("models", "cait_xxs24_224", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["name"] == "cait_xxs24_224"
    assert (facts["depth"], facts["widths"], facts["grids"]) == (24, [192], [[14, 14]])
    assert facts["tags"] == {"fb_dist_in1k": 1000} and facts["top1"] == {"fb_dist_in1k": 78.38}
    everything = json.loads(cli("models", "--json")[1])
    assert len(everything) == 647
    with_weights = json.loads(cli("models", "--json", "--pretrained")[1])
    assert len(with_weights) == 647 - 83  # timm has no weights at all for these


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["deit4_small"], "no timm vision transformer matches 'deit4_small'", "did you mean"),
        (["qqqqq"], "matches 'qqqqq'", "such as deit3"),
        (["coatnet_0_224", "--pretrained"], "has pretrained weights", "leave out --pretrained"),
    ],
)
def test_what_matches_nothing(cli, arguments, message, hint):
    code, _, error = cli("models", *arguments)
    assert code == 2 and message in error and hint in error


@pytest.mark.parametrize("word", ["eupe", "lvd1689m", "dinov3"])
def test_words_of_tags_are_found(word, cli):
    code, out, _ = cli("models", word, "--json")
    found = json.loads(out)
    assert code == 0 and "vit_small_patch16_dinov3_qkvb" in {facts["name"] for facts in found}
    assert all(word in facts["name"] or any(word in tag for tag in facts["tags"]) for facts in found)
