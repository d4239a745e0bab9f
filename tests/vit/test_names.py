"""Typed names → timm models: the promised table, every name of timm's ViTs, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from timm.models import get_arch_pretrained_cfgs, get_deprecated_models

from vitkd_cli.errors import UserError
from vitkd_cli.vit import names, zoo
from vitkd_cli.vit.config import is_embedding
from vitkd_cli.vit.names import (
    PUBLISHED_TOP1,
    Resolved,
    better_tags,
    classes_of,
    published_top1,
    resolve,
    teacher_tag_for,
)
from vitkd_cli.vit.short_names import short_form, short_forms

VITS = list(zoo.vits())

SHORT = """
deit3_small         deit3_small_patch16_224
deit_tiny           deit_tiny_patch16_224
deit_small          deit_small_patch16_224
vit_base            vit_base_patch16_224
vit_tiny            vit_tiny_patch16_224
vit_small_patch16   vit_small_patch16_224
dinov2_small        vit_small_patch14_dinov2
dinov3_base         vit_base_patch16_dinov3
dinov2_vits14       vit_small_patch14_dinov2
vits16              vit_small_patch16_224
dinov3_vits16plus   vit_small_plus_patch16_dinov3
vit_b_16            vit_base_patch16_224
ViT-B/16            vit_base_patch16_224
DeiT-Tiny           deit_tiny_patch16_224
deit3_small_384     deit3_small_patch16_384
vit_base_384        vit_base_patch16_384
timm/vit_tiny       vit_tiny_patch16_224
swin_tiny           swin_tiny_patch4_window7_224
swin_t              swin_tiny_patch4_window7_224
swinv2_tiny         swinv2_tiny_window8_256
cait_s24            cait_s24_224
eva02_small         eva02_small_patch14_224
beit_base           beit_base_patch16_224
beitv2_base         beitv2_base_patch16_224
siglip_base         vit_base_patch16_siglip_224
clip_base           vit_base_patch16_clip_224
vit_base_clip       vit_base_patch16_clip_224
coatnet_0           coatnet_0_224
hiera_small         hiera_small_224
volo_d1             volo_d1_224
vit_huge            vit_huge_patch14_224
dinov2_small_reg4   vit_small_patch14_reg4_dinov2
deit_base_distilled deit_base_distilled_patch16_224
xcit_tiny_12        xcit_tiny_12_p16_224
"""


@pytest.mark.parametrize(("typed", "architecture"), [line.split() for line in SHORT.split("\n") if line])
def test_short_names(typed: str, architecture: str) -> None:
    found = resolve(typed)
    assert (found.architecture, found.why) == (architecture, "short name")
    # Without a tag, timm's own default stands, and is written out.
    default = next(iter(get_arch_pretrained_cfgs(architecture)))
    assert found.name == default
    assert not found.tag_was_typed


@pytest.mark.parametrize(
    ("typed", "name", "why"),
    [
        ("deit3_small_patch16_224.fb_in22k_ft_in1k", "deit3_small_patch16_224.fb_in22k_ft_in1k", "exact"),
        ("deit3_small.fb_in22k_ft_in1k", "deit3_small_patch16_224.fb_in22k_ft_in1k", "short name"),
        ("vit_base.mae", "vit_base_patch16_224.mae", "short name"),
        (
            "timm/deit3_small_patch16_224.fb_in1k",
            "deit3_small_patch16_224.fb_in1k",
            "timm/ prefix dropped",
        ),
        (
            "deit3_small_patch16_224_in21ft1k",
            "deit3_small_patch16_224.fb_in22k_ft_in1k",
            "deprecated name",
        ),
        ("mvitv2_tiny", "mvitv2_tiny.fb_in1k", "exact"),
        ("pvt_v2_b0", "pvt_v2_b0.in1k", "exact"),
        ("levit_128", "levit_128.fb_dist_in1k", "exact"),
        ("convit_tiny", "convit_tiny.fb_in1k", "exact"),
        ("samvit-base-patch16", "samvit_base_patch16.sa1b", "exact"),  # not the tie of samvit_base
    ],
)
def test_names_and_tags(typed: str, name: str, why: str) -> None:
    found = resolve(typed)
    assert (found.name, found.why) == (name, why)
    assert found.tag_was_typed == ("." in typed or why.startswith("deprecated"))


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        ("hf-hub:timm/deit3_small_patch16_224.fb_in1k", "hf-hub:timm/deit3_small_patch16_224.fb_in1k"),
        ("hf_hub:me/mine", "hf-hub:me/mine"),
        ("local-dir:runs/a/student", "local-dir:runs/a/student"),
    ],
)
def test_addresses_are_handed_to_timm(typed: str, address: str) -> None:
    found = resolve(typed)
    assert (found.name, found.architecture, found.num_classes) == (address, "", None)
    assert found.why in found.line()


def test_a_mistyped_run_beside_others_is_no_hub_id(tmp_path, monkeypatch) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no folder runs/frist") as refused:
        resolve("runs/frist")
    assert refused.value.hint == "runs has first; a model of the Hub is hf-hub:runs/frist"


def test_words_of_a_tag_may_stand_in_a_name() -> None:
    assert resolve("vit_tiny_eupe").name == "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
    assert resolve("dinov3_small_lvd1689m").name == "vit_small_patch16_dinov3.lvd1689m"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("vit_base.nosuch", ["vit_base_patch16_224 has no tag nosuch", "augreg2_in21k_ft_in1k", "mae"]),
        ("vit_base_patch16_224.nosuch", ["no tag nosuch", "augreg2_in21k_ft_in1k"]),
        ("facebook/deit-tiny-patch16-224", ["hf-hub:facebook/deit-tiny", "mean deit_tiny_patch16_224?"]),
        ("google/vit-base-patch16-224", ["hf-hub:google/vit-base", "mean vit_base_patch16_224?"]),
        ("someone/nonsense", ["hf-hub:someone/nonsense (timm format only)"]),
        ("runs/2026/a", ["there is no folder runs/2026/a"]),
        ("cait", ["ambiguous", "cait_s24_224", "cait_m36_384", "(10)"]),
        ("xcit_tiny", ["ambiguous", "xcit_tiny_12_p16_224", "(8)"]),
        ("maxvit_tiny", ["ambiguous", "maxvit_tiny_rw_224", "maxvit_tiny_tf_512"]),
        ("tiny_vit", ["ambiguous", "tiny_vit_11m_224", "tiny_vit_21m_512"]),
        ("vit", ["ambiguous", "vit_base_patch16_224", "vit_tiny_patch16_224"]),
        ("vit_so400m", ["ambiguous", "vit_so400m_patch14_siglip_224", "(16)"]),
        ("samvit_base", ["ambiguous", "samvit_base_patch16, samvit_base_patch16_224"]),
        ("naflexvit", ["ambiguous", "naflexvit_base_patch16_gap", "(14)"]),
        ("levit_conv", ["ambiguous", "levit_conv_128"]),  # their numbers are widths, not image sizes
        ("eupe", ["'eupe' is ambiguous", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"]),
        ("lvd1689m", ["ambiguous", "vit_small_patch16_dinov3.lvd1689m"]),
        (
            "vit_small_dinov3_qkvb_lvd1689m",
            ["ambiguous", "dinov3_qkvb.lvd1689m", "dinov3_qkvb.eupe_lvd1689m"],
        ),
        ("deit_smal", ["no model is called 'deit_smal'", "did you mean deit_small, "]),
        ("vit_bas", ["no model is called", "did you mean vit_base, "]),
        ("deit4_small", ["no model is called", "did you mean deit_small, "]),
        ("small", ["no model is called", "say more: ", "vit_small"]),
        ("nonsense", ["no model is called 'nonsense'", "nothing near"]),
        ("9" * 400, ["no model is called", "nothing near"]),
        ("a\0b", ["no model is called"]),
        ("resnet50", ["resnet50 is a timm model but no ViT"]),
        ("resnet50.a1_in1k", ["resnet50 is a timm model but no ViT"]),
        ("poolformer_s12", ["poolformer_s12 is a timm model but no ViT"]),
        ("mobilevitv2_100", ["no ViT"]),
        ("best.pt", ["best.pt looks like a file"]),
        ("runs/a/best.safetensors", ["looks like a file", "--checkpoint"]),
        ("", ["name is empty"]),
        ("hf-hub:", ["nothing behind hf-hub:"]),
    ],
)
def test_refusals_name_the_problem_and_the_cure(typed: str, said: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        resolve(typed)
    assert refusal.value.hint
    for words in said:
        assert words in str(refusal.value)


def test_a_name_that_the_table_lacks_is_looked_at(monkeypatch) -> None:
    monkeypatch.setattr(names, "timm_version", lambda: "1.0.0")
    lacking = {name: facts for name, facts in zoo.zoo().items() if name != "test_vit"}
    monkeypatch.setattr(zoo, "zoo", lambda: lacking)
    zoo.vits.cache_clear()
    try:
        assert resolve("test_vit").architecture == "test_vit"
        with pytest.raises(UserError, match="resnet18 is a timm model but no ViT"):
            resolve("resnet18")
    finally:
        zoo.vits.cache_clear()


def test_every_name_and_every_tag_is_itself() -> None:
    for name in VITS:
        found = resolve(name)
        assert (found.architecture, found.why) == (name, "exact")
        for tagged in get_arch_pretrained_cfgs(name):
            assert resolve(tagged).name == tagged


def test_a_short_form_stays_among_its_own_models() -> None:
    refused = []
    for form in short_forms():
        try:
            assert short_form(resolve(form).architecture) == form
        except UserError as refusal:
            refused.append(form)
            assert "ambiguous" in refusal.message
    assert len(refused) <= 3, refused  # sizes of equal cost: eva_large at 196 and 336 px


def test_deprecated_names_are_renamed_as_timm_does() -> None:
    for old, new in get_deprecated_models().items():
        architecture, dot, tag = (new or "").partition(".")
        # timm maps two names onto tags that it has renamed since, and cannot build them either.
        if new and architecture in VITS and (not dot or new in get_arch_pretrained_cfgs(architecture)):
            assert resolve(old).name == resolve(new).name
            assert resolve(old).tag_was_typed == bool(tag)
        else:
            with pytest.raises(UserError):
                resolve(old)


@pytest.mark.parametrize(
    ("name", "classes", "embeds"),
    [
        ("deit3_small_patch16_224.fb_in1k", 1000, False),
        ("vit_base_patch16_224.augreg_in21k", 21843, False),
        ("swin_tiny_patch4_window7_224.ms_in22k", 21841, False),
        ("vit_medium_patch16_gap_240.sw_in12k", 11821, False),
        ("vit_base_patch16_224.mae", 0, False),
        ("vit_base_patch16_siglip_224.webli", 0, False),
        ("vit_base_patch16_clip_224.openai", 0, True),
        ("vit_base_patch16_clip_224.openai_ft_in1k", 1000, False),
        ("vit_large_patch14_clip_224.openai", 0, True),
        ("vitamin_small_224.datacomp1b_clip", 0, True),
        ("vit_gigantic_patch14_clip_224.laion2b", 0, True),
    ],
)
def test_classes_are_told_from_embeddings(name: str, classes: int, embeds: bool) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert classes_of(cfg) == classes_of(cfg.to_dict()) == classes
    found = resolve(name)
    assert (found.num_classes, found.embeds) == (classes, embeds)


def test_labels_settle_whether_a_width_is_an_embedding() -> None:
    assert is_embedding(512)
    assert not is_embedding(512, has_labels=True)
    assert classes_of({"num_classes": 512, "label_names": ["a"]}) == 512
    assert classes_of({"num_classes": 10}) == 10
    assert classes_of({"num_classes": 0}) == classes_of({}) == 0


def test_tags_that_name_labelled_data_have_classes_and_no_others() -> None:
    labelled = ("in1k", "in12k", "in21k", "in22k", "inw21k", "bamboo", "usi_in1k")
    for name in VITS:
        for tagged, cfg in get_arch_pretrained_cfgs(name).items():
            if is_embedding(cfg.num_classes):
                assert not any(word in tagged.partition(".")[2] for word in labelled), tagged
            elif cfg.num_classes and cfg.has_weights:
                tag = tagged.partition(".")[2]
                assert any(word in tag for word in labelled) or cfg.num_classes == 1000, tagged


def test_lines() -> None:
    assert resolve("deit3_small").line() == "deit3_small → deit3_small_patch16_224.fb_in1k (1000 classes)"
    assert resolve("vit_base.mae").line() == "vit_base.mae → vit_base_patch16_224.mae (no head)"
    assert resolve("vit_base.mae").has_weights
    assert "(embeds, no classes)" in resolve("clip_base.openai").line()
    assert "deprecated" in resolve("deit3_small_patch16_224_in21ft1k").line()
    exact = "deit_tiny_patch16_224.fb_in1k"
    assert resolve(exact).line() == f"{exact} (1000 classes)"


def test_a_name_without_weights_says_so() -> None:
    found = resolve("coatnet_0")
    assert not found.has_weights
    assert "no pretrained weights" in found.line()
    assert resolve("coatnet_0_rw_224").has_weights


def test_a_run_folder_and_a_model_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    student = run / "student"
    student.mkdir(parents=True)
    with pytest.raises(UserError, match="neither config"):
        resolve(str(run))
    (student / "config.json").write_text(json.dumps({"architecture": "deit_tiny_patch16_224"}))
    for folder, why in ((run, "run folder"), (student, "folder")):
        found = resolve(str(folder))
        assert (found.name, found.why, found.num_classes) == (f"local-dir:{student}", why, None)
        assert found.has_weights


def test_a_folder_in_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="names no timm architecture"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        resolve(str(tmp_path))


def test_a_folder_called_like_a_model_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deit_tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("deit_tiny").architecture == "deit_tiny_patch16_224"
    with pytest.raises(UserError, match="neither"):
        resolve("./deit_tiny")


@pytest.mark.parametrize(
    ("role", "flag"),
    [("teacher", "--teacher-checkpoint"), ("student", "--initial-checkpoint"), ("model", "--checkpoint")],
)
@pytest.mark.parametrize("file", ["best.pth", "model.safetensors", "weights"])
def test_a_bare_file_is_refused_with_the_flag_that_takes_it(
    tmp_path: Path, role: str, flag: str, file: str
) -> None:
    path = tmp_path / file
    path.write_bytes(b"")
    with pytest.raises(UserError) as refusal:
        resolve(str(path), role=role)
    assert "no architecture" in refusal.value.message
    assert f" {flag} {path}" in refusal.value.hint


def test_published_figures_belong_to_tags_of_timm_with_1000_classes() -> None:
    for architecture, figures in PUBLISHED_TOP1.items():
        for tag, top1 in figures.items():
            found = resolve(f"{architecture}.{tag}")
            assert (found.why, found.num_classes, found.has_weights) == ("exact", 1000, True)
            assert published_top1(found.name) == top1
            assert 65 < top1 < 91


def test_better_tags_of_the_papers_teacher() -> None:
    teacher = resolve("deit3_small")
    assert published_top1(teacher.name) == 81.38
    assert better_tags(teacher) == [("fb_in22k_ft_in1k", 83.08)]
    assert better_tags(resolve("deit3_small.fb_in22k_ft_in1k")) == []
    assert [tag for tag, _ in better_tags(resolve("vit_base.augreg_in1k"))] == [
        "augreg2_in21k_ft_in1k",
        "augreg_in21k_ft_in1k",
        "orig_in21k_ft_in1k",
        "sam_in1k",
    ]
    assert better_tags(resolve("dinov2_small")) == []
    assert published_top1("hf-hub:timm/deit_tiny_patch16_224.fb_in1k") is None


def test_a_teachers_tag_follows_the_classes_of_the_data() -> None:
    switched = teacher_tag_for(resolve("tiny_vit_21m_224"), 1000)
    assert (switched.tag, switched.num_classes) == ("dist_in22k_ft_in1k", 1000)
    assert "tag chosen for 1000 classes" in switched.line()
    assert not switched.tag_was_typed
    assert teacher_tag_for(resolve("vit_base"), 21843).tag == "augreg_in21k"


@pytest.mark.parametrize(
    ("typed", "classes"),
    [
        ("deit3_small", 1000),  # fits already
        ("deit3_small", 10),  # nothing fits
        ("tiny_vit_21m_224.dist_in22k", 1000),  # the user chose
        ("hf-hub:timm/whatever", 1000),  # unknown
        ("coatnet_0", 7),
    ],
)
def test_a_teachers_tag_stays(typed: str, classes: int) -> None:
    before = resolve(typed)
    assert teacher_tag_for(before, classes) is before


def test_defaults_that_need_another_tag_for_1000_classes() -> None:
    if timm.__version__ != "1.0.31":
        pytest.skip("the tags were listed in timm 1.0.31")
    switched = {n for n in VITS if teacher_tag_for(resolve(n), 1000).why == "tag"}
    assert switched == {
        "vit_base_patch16_224_miil",
        "vit_so400m_patch14_siglip_378",
        "vit_so400m_patch14_siglip_gap_378",
        "tiny_vit_5m_224",
        "tiny_vit_11m_224",
        "tiny_vit_21m_224",
    }


def test_importing_names_does_not_import_torch() -> None:
    code = "import sys, vitkd_cli.vit.names; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_resolved_is_a_value() -> None:
    assert resolve("deit_tiny") == resolve("deit_tiny")
    with pytest.raises(AttributeError):
        resolve("deit_tiny").name = "other"  # type: ignore[misc]
    assert isinstance(resolve("deit_tiny"), Resolved)
