from typing import Annotated

import pytest
import torch
from torch import nn

from vitkd_cli.errors import UserError
from vitkd_cli.objective import MACROS, Clock, Formula, Objective, Summand, Weight, options_for, parse, words
from vitkd_cli.options import declared
from vitkd_cli.report.tables import term_rows
from vitkd_cli.terms import Batch, Term, term
from vitkd_cli.vit.spec import BlockSpec, ViTSpec
from vitkd_cli.vit.taps import FINAL, LOGITS, features


def vit(dim=8, *, depth=3, classes=24, grid=(2, 2), name="vit"):
    blocks = tuple(BlockSpec(f"blocks.{i}", dim, grid, heads=2, num_prefix_tokens=1) for i in range(depth))
    half = (0.5, 0.5, 0.5)
    return ViTSpec(
        name, blocks, 1, (8, 8), half, half, classes, embed_dim=dim, final_dim=dim, final_grid=grid
    )


def signals(objective, images=4):
    generator = torch.Generator().manual_seed(0)
    taps = []
    for spec, wanted in (
        (objective.student, objective.student_taps),
        (objective.teacher, objective.teacher_taps),
    ):
        taps.append({})
        for tap in sorted(wanted, key=str):
            shape = (spec.num_classes,) if tap == LOGITS else (4, spec.final_dim)
            taps[-1][tap] = torch.randn(images, *shape, generator=generator)
    return taps


def batch(**facts):
    return Batch(torch.tensor([1, 2, 3, 0]), generator=torch.Generator().manual_seed(7), **facts)


# ------------------------------------------------------------------------------ reading a formula


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("labels", "labels"),
        ("labels + vitkd + nkd", "labels + 3e-5*mimic + 3e-6*generate + nkd"),
        ("3e-5*mimic(blocks=(0,1))", "3e-5*mimic"),
        ("mimic(blocks=[0, -1])", "mimic(blocks=(0, -1))"),
        ("mimic(blocks=-1)", "mimic(blocks=(-1,))"),
        ('mimic(norm="raw")', 'mimic(norm="raw")'),
        ("kd(soft_ce=true)", "kd(soft_ce=true)"),
        ("kd(soft_ce=True, temperature=4)", "kd(temperature=4, soft_ce=true)"),
        ("0.5*labels + kd*0.5", "0.5*labels + 0.5*kd"),
        ("0.5*(labels + 2*kd)", "0.5*labels + kd"),
        ("(labels + kd)/2", "0.5*labels + 0.5*kd"),
        ("2*3*kd", "6*kd"),
        ("labels - 0.5*kd", "labels - 0.5*kd"),
        ("0*kd", "0*kd"),
        ("2*vitkd(alpha=1, beta=0.5, mask=0.3)", "2*mimic + generate(mask=0.3)"),
        ("labels + mimic(balance=0.1, blocks=0)", "labels + mimic(blocks=(0,), balance=0.1)"),
        ("2*(labels + kd(balance=0.25)/2)", "2*labels + kd(balance=0.25)"),
        (
            "labels + kd(balance=0.5)*linear(1, 0)*warmup(2)",
            "labels + linear(start=1, end=0)*warmup(epochs=2)*kd(balance=0.5)",
        ),
        ("nkd + vitkd(balance=0.25)", "nkd + mimic(balance=0.125) + generate(balance=0.125)"),
        ('vitkd(reduce="mean", norm="raw", target_norm="layer")', None),
        ("labels\n  + nkd(gamma=1)\n", "labels + nkd"),
        ("1e20*kd", "1e20*kd"),
        ("kd * cosine(1, 0)", "cosine(start=1, end=0)*kd"),
        ("linear(end=0.5, start=1)*kd", "linear(start=1, end=0.5)*kd"),
        ("3e-5*mimic*warmup(epochs=5)", "3e-5*warmup(epochs=5)*mimic"),
        ("kd*warmup(5)*2*until(epoch=100)/4", "0.5*until(epoch=100)*warmup(epochs=5)*kd"),
        ("labels - since(epoch=1.5)*kd", "labels - 1*since(epoch=1.5)*kd"),
        (
            "(labels + 2*kd*until(epoch=9))*cosine(1, 0)",
            "cosine(start=1, end=0)*labels + 2*cosine(start=1, end=0)*until(epoch=9)*kd",
        ),
        ("vitkd * until(epoch=100)", "3e-5*until(epoch=100)*mimic + 3e-6*until(epoch=100)*generate"),
    ],
)
def test_the_canonical_form_reads_back_as_the_same_formula(written, canonical):
    formula = parse(written)
    assert canonical is None or str(formula) == canonical
    assert parse(str(formula)) == formula
    assert str(parse(str(formula))) == str(formula)


def test_a_formula_is_literal_and_keeps_its_order():
    assert parse("nkd + labels").names == ("nkd", "labels")


def test_defaults_written_or_not_are_one_formula():
    assert parse("nkd") == parse("nkd(temperature=1, gamma=1.0)")
    assert parse("kd*until(9)*warmup(5)") == parse("warmup(epochs=5)*kd*until(epoch=9)")
    assert hash(parse("nkd")) == hash(parse("1*nkd(gamma=1)"))
    assert parse("nkd(gamma=2)").summands == (
        Summand(Weight(), "nkd", (("gamma", 2.0), ("temperature", 1.0))),
    )


@pytest.mark.parametrize(
    ("formula", "labels", "teacher"),
    [
        ("labels", True, False),
        ("kd", False, True),
        ("vitkd", False, True),
        ("nkd", True, True),
        ("labels + vitkd", True, True),
    ],
)
def test_what_a_formula_needs_is_known_before_any_model(formula, labels, teacher):
    assert (parse(formula).uses_labels, parse(formula).uses_teacher) == (labels, teacher)


@pytest.mark.parametrize(
    ("formula", "message", "hint"),
    [
        ("", "is empty", "an example"),
        ("nkdd", "no term is called 'nkdd'", "did you mean nkd?"),
        ("labels + Vitkd", "no term is called 'Vitkd'", "did you mean vitkd?"),
        ("qqq", "no term is called 'qqq'", "there are: "),
        ("nkd(gama=1)", "nkd has no option 'gama'", "did you mean gamma?"),
        ("vitkd(alfa=1)", "vitkd has no option 'alfa'", "did you mean alpha?"),
        ("kd(**{})", "kd has no option", "temperature"),
        ("kd(temperature=1, temperature=2)", "temperature twice", "leave one"),
        ("nkd(1.5)", "options are given by name", "nkd(gamma=1.5)"),
        ('nkd(gamma="a")', "gamma must be a number, not 'a'", "nkd(gamma=1)"),
        ("nkd(gamma=true)", "gamma must be a number", ""),
        ("nkd(gamma=none)", "gamma must be a number", ""),
        ("nkd(gamma=1e999)", "gamma must be a finite number", ""),
        ("generate(block=1.5)", "block must be a whole number", "generate(block=-1)"),
        ("kd(soft_ce=1)", "soft_ce must be true or false", "kd(soft_ce=false)"),
        ("mimic(blocks=(0, 0.5))", "blocks must be whole numbers", "(0, 1)"),
        ('mimic(norm="rew")', 'one of "auto", "raw", "final"', ""),
        ("mimic(norm=raw)", "with quotes if a string", 'mimic(norm="auto")'),
        ("mimic(blocks=range(2))", "blocks must be a literal", ""),
        ("labels + ", "cannot be read", "an example"),
        ("labels + (kd", "never closed at character 10", "an example"),
        ("labels kd", "cannot be read", "an example"),
        ("labels * kd", "neither a term nor a sum", "an example"),
        ("labels ** 2", "neither a term nor a sum", "an example"),
        ("2 / kd", "neither a term nor a sum", "an example"),
        ("labels + 2", "2 is a weight, not a term", "0.5*labels"),
        ("cosine(1, 0)", "cosine(1, 0) is a weight, not a term", "multiply it with one"),
        ("labels + 2*cosine(1, 0)", "2 * cosine(1, 0) is a weight, not a term", "multiply it with one"),
        ("kd * cosin(1, 0)", "no schedule is called 'cosin'", "did you mean cosine?"),
        ("0.5 * warm(epochs=5) * kd", "no schedule is called 'warm'", "did you mean warmup?"),
        ("kd*cosine", "cosine takes start and end", "kd*cosine(1, 0)"),
        ("kd*cosine(1)", "cosine takes start and end", "kd*cosine(1, 0)"),
        ("kd*warmup(5, 6)", "warmup takes epochs", "kd*warmup(epochs=5)"),
        ("kd*warmup(epoch=5)", "warmup takes epochs", "kd*warmup(epochs=5)"),
        ("kd*cosine(1, start=1)", "cosine takes start and end", ""),
        ("kd*warmup(**{})", "warmup takes epochs", ""),
        ("kd*warmup(epochs=0)", "epochs must be a number above 0", ""),
        ("kd*until(epoch=-1)", "epoch must be a number from 0 on", ""),
        ("kd*cosine(1e999, 0)", "start must be a number from 0 on", ""),
        ("kd*cosine(true, 'a')", "start must be a number from 0 on", ""),
        ("kd*until(epoch=cosine(1, 0))", "epoch must be a number from 0 on", ""),
        ("kd/cosine(1, 0)", "neither a term nor a sum", ""),
        ("kd / 0", "divides by zero", ""),
        ("1e999*kd", "weight of kd is inf", ""),
        ("1" + "0" * 400 + "*kd", "cannot be read", ""),
        ("-" * 20000 + "kd", "cannot be read", ""),
        ("__import__('os').system('true')", "neither a term nor a sum", ""),
        ("kd(temperature=__import__('os').cpu_count())", "temperature must be a literal", ""),
        ("labels + labels(smoothing=0.1)", "the objective has labels twice", "sum of both weights"),
        ("vitkd + 2*mimic", "the objective has mimic twice", "sum of both weights"),
        ("kd*until(epoch=5) + kd*since(epoch=5)", "the objective has kd twice", "sum of both weights"),
        ("labels + 3e-5*mimic(balance=0.1)", "the weight 3e-5 and balance=0.1", "leave one of them out"),
        ("labels - mimic(balance=0.1)", "the weight -1 and balance=0.1", "leave one of them out"),
        ("labels + 2*vitkd(balance=0.1)", "mimic has the weight 2 and balance=0.05", "leave one of them out"),
        ("labels + vitkd(alpha=1e-5, balance=0.1)", "alpha and beta are weights", "mimic(balance=0.02)"),
        ("kd(balance=0.1) + vitkd(balance=0.2)", "no term to balance the others against", "labels + mimic"),
        ("0*labels + kd(balance=0.1)", "no term to balance the others against", "weight of its own"),
        ("labels + kd(balance=0)", "kd: balance must be above 0", "vitkd methods kd"),
        ("labels + kd(balance=1)", "kd: balance must be below 1", "vitkd methods kd"),
        ("labels + kd(balance=-0.1)", "kd: balance must be above 0", "vitkd methods kd"),
        ("labels + vitkd(balance='a')", "vitkd: balance must be a number", "vitkd methods vitkd"),
        ("labels + kd(balance=cosine(1, 0))", "balance must be a literal", "vitkd methods kd"),
        ("labels + mimic(balance=0.1) + 3e-5*mimic", "the objective has mimic twice", "once"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line_with_a_cure(formula, message, hint):
    with pytest.raises(UserError) as refusal:
        parse(formula)
    assert message in refusal.value.message and hint in refusal.value.hint
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


def test_every_macro_is_a_formula_and_explains_its_options():
    for name, macro in MACROS.items():
        assert isinstance(parse(name), Formula) and len(parse(name).summands) > 1
        assert macro.__doc__
        assert all(option.option.help for option in declared(macro).values())


def test_a_macro_hands_its_options_to_both_terms():
    mimic, generate = parse('vitkd(mask=0.25, reduce="mean", target_norm="layer", norm="raw")').summands
    shared = {"reduce": "mean", "target_norm": "layer", "norm": "raw"}
    assert dict(mimic.options).items() >= ({"blocks": (0, 1)} | shared).items()
    assert dict(generate.options).items() >= ({"block": -1, "mask": 0.25} | shared).items()


# ------------------------------------------------------------------------------ its value


def test_the_total_is_the_weighted_sum_of_the_raw_terms():
    objective = Objective("0.5*labels + 0.01*mimic + 2*kd(temperature=2)", vit(8), vit(12))
    total, raw = objective(*signals(objective), batch())
    assert list(raw) == ["labels", "mimic", "kd"]
    torch.testing.assert_close(total, 0.5 * raw["labels"] + 0.01 * raw["mimic"] + 2 * raw["kd"])


def test_taps_are_the_union_of_what_terms_compare():
    objective = Objective("labels + vitkd + mimic(blocks=(1,))", vit(8), vit(12, depth=5))
    assert objective.student_taps == {LOGITS, features(0), features(1), FINAL}
    assert objective.teacher_taps == {features(0), features(1), FINAL}
    assert not objective.needs_teacher_logits
    assert Objective("nkd", vit(), vit()).needs_teacher_logits


def test_labels_alone_need_no_teacher():
    objective = Objective("labels", vit(), None)
    assert not objective.uses_teacher and objective.uses_labels and objective.teacher_taps == frozenset()
    total, _ = objective({LOGITS: torch.zeros(4, 24)}, {}, batch())
    torch.testing.assert_close(total, torch.tensor(24.0).log())


def test_a_term_that_stands_there_twice_has_a_name_for_each():
    objective = Objective("kd + 2*kd(temperature=2) + 3*kd(temperature=4)", vit(), vit())
    assert objective.weights_at(0) == {"kd": 1, "kd_2": 2, "kd_3": 3}
    assert list(objective.terms) == ["kd", "kd_2", "kd_3"]


def test_a_weight_of_zero_is_said_and_stays_in_the_graph():
    objective = Objective("labels + 0*mimic", vit(8), vit(12))
    assert ["mimic" in warning for warning in objective.warnings] == [True]
    total, raw = objective(*signals(objective), batch())
    total.backward()
    torch.testing.assert_close(total, raw["labels"])
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())
    assert raw["mimic"] > 0


# Ten epochs of ten updates: the first update is 0, the last is 99.
@pytest.mark.parametrize(
    ("weight", "values"),
    [
        ("2*cosine(1, 0)", {0: 2, 33: 1.5, 66: 0.5, 99: 0}),
        ("linear(0.5, 1)", {0: 0.5, 33: 4 / 6, 99: 1}),
        ("warmup(epochs=2)", {0: 0, 5: 0.25, 19: 0.95, 20: 1, 99: 1}),
        ("until(epoch=3)", {0: 1, 29: 1, 30: 0, 99: 0}),
        ("since(epoch=2.5)", {0: 0, 24: 0, 25: 1, 99: 1}),
        ("3*warmup(epochs=2)*linear(1, 0)*until(epoch=9)", {11: 3 * 0.55 * 88 / 99, 99: 0}),
    ],
)
def test_a_weight_follows_its_schedules(weight, values):
    objective = Objective(f"labels + {weight}*kd", vit(), vit(), Clock(updates=100, updates_per_epoch=10))
    for update, value in values.items():
        assert objective.weights_at(update) == pytest.approx({"labels": 1, "kd": value})
        total, raw = objective(*signals(objective), batch(update=update))
        torch.testing.assert_close(total, raw["labels"] + value * raw["kd"])


def test_an_unplanned_objective_stands_at_its_first_update():
    objective = Objective("labels + kd*warmup(epochs=5) + nkd*cosine(0.5, 0)", vit(), vit())
    assert objective.weights_at(0) == {"labels": 1, "kd": 0, "nkd": 0.5}


@pytest.mark.parametrize(
    ("weight", "silent"), [("until(epoch=0)", True), ("since(epoch=10)", True), ("since(epoch=9.9)", False)]
)
def test_a_weight_that_is_zero_over_the_whole_run_is_said(weight, silent):
    objective = Objective(f"labels + {weight}*mimic", vit(), vit(), Clock(updates=100, updates_per_epoch=10))
    assert ["mimic has weight 0" in warning for warning in objective.warnings] == [True] * silent


def test_a_weight_that_starts_at_zero_leaves_every_parameter_in_the_graph():
    objective = Objective("labels + mimic*warmup(epochs=5)", vit(8), vit(12), Clock(100, 10))
    objective(*signals(objective), batch())[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


def test_every_word_can_be_balanced():
    for name in words():
        assert options_for(name)["balance"].default is None
        own = parse(f"{name}(balance=0.5) + 0.1*correlation(blocks=2)").summands[:-1]
        assert sum(summand.weight.balance for summand in own) == 0.5


def test_a_term_never_hears_of_its_balance_and_the_objective_weighs_it():
    objective = Objective("labels + mimic(balance=0.25)*linear(1, 0.4)", vit(8), vit(12), Clock(100, 10))
    assert not hasattr(objective.terms["mimic"], "balance")
    assert objective.weights_at(0) == {"labels": 1, "mimic": 0}
    objective.balance.estimate({"labels": 1.0, "mimic": 10.0}, objective.weights_at(0))
    assert objective.weights_at(0) == pytest.approx({"labels": 1, "mimic": 0.25 / 0.75 / 10})
    assert objective.weights_at(99) == pytest.approx({"labels": 1, "mimic": 0.1 / 0.9 / 10})
    total, raw = objective(*signals(objective), batch(update=99))
    torch.testing.assert_close(total, raw["labels"] + 0.1 / 0.9 / 10 * raw["mimic"])
    assert Objective("labels + mimic", vit(8), vit(12)).balance is None


@pytest.mark.parametrize(
    ("formula", "most"),
    [
        ("labels + kd(balance=0.5) + mimic(balance=0.5)", "1"),
        ("labels + vitkd(balance=0.9) + kd(balance=0.3)", "1.2"),
        ("labels + kd(balance=0.5)*linear(0, 2)", "1"),
        ("labels + kd(balance=0.6)*until(6) + mimic(balance=0.7)*since(5)", "1.3"),
        ("labels + kd(balance=0.6)*until(5) + mimic(balance=0.7)*since(5)", None),
    ],
)
def test_shares_that_leave_nothing_at_any_time_are_refused(formula, most):
    clock = Clock(updates=100, updates_per_epoch=10)
    if most is None:
        assert Objective(formula, vit(), vit(), clock).balance
        return
    with pytest.raises(
        UserError, match=f"balanced terms are to have {most} of the student's gradient"
    ) as why:
        Objective(formula, vit(), vit(), clock)
    assert "balance=0.1" in why.value.hint


def test_a_share_that_is_zero_over_the_whole_run_is_said():
    objective = Objective("labels + kd(balance=0.5)*until(0)", vit(), vit(), Clock(100, 10))
    assert "kd has weight 0" in objective.warnings[0]


def test_a_term_with_an_option_of_that_name_is_told(registry):
    @term("poised")
    class Poised(Term):
        balance: Annotated[float, "Another thing."] = 1.0

    with pytest.raises(UserError, match="the term 'poised' has an option 'balance'"):
        options_for("poised")


def test_a_negative_weight_is_said():
    assert "maximised" in Objective("labels - kd", vit(), vit()).warnings[0]


def test_no_gradient_goes_to_the_teacher():
    objective = Objective("vitkd + kd", vit(8), vit(12))
    student, teacher = signals(objective)
    for tensor in [*student.values(), *teacher.values()]:
        tensor.requires_grad_()
    objective(student, teacher, batch())[0].backward()
    assert all(tensor.grad is None for tensor in teacher.values())
    assert all(tensor.grad is not None for tensor in student.values())


def test_what_a_term_draws_depends_on_its_place_and_the_seed_alone():
    """Another term before it, with draws or without, moves no mask as long as the place is the same."""
    alone = Objective("kd + generate", vit(8), vit(8))
    beside = Objective("generate(mask=0.25) + generate", vit(8), vit(8))
    beside.terms["generate_2"].load_state_dict(alone.terms["generate"].state_dict())
    _, raw = alone(*signals(alone), batch())
    _, other = beside({FINAL: signals(alone)[0][FINAL]}, {FINAL: signals(alone)[1][FINAL]}, batch())
    assert raw["generate"] == other["generate_2"]

    moved = Batch(generator=torch.Generator().manual_seed(8))
    assert alone(*signals(alone), moved)[1]["generate"] != raw["generate"]


def test_the_batchs_generator_is_left_as_it_was():
    objective, given = Objective("generate", vit(), vit()), batch()
    before = given.generator.get_state()
    objective(*signals(objective), given)
    assert torch.equal(before, given.generator.get_state())


def test_two_terms_of_one_kind_draw_different_masks():
    objective = Objective("generate + 2*generate(target_norm='layer')", vit(4), vit(4))
    seen = []
    for one in objective.terms.values():
        one.register_forward_pre_hook(lambda _, args: seen.append(args[1].rand(2, 4)))
    objective(*signals(objective), batch())
    assert not torch.equal(*seen)


def test_the_table_shows_weights_all_options_and_widths():
    objective = Objective(
        "labels + 3e-5*mimic + 3e-6*generate + nkd", vit(192), vit(384, depth=12, grid=(4, 4))
    )
    rows = {row[0]: row for row in term_rows(objective)}
    assert rows["mimic"] == (
        "mimic",
        "3e-5",
        'blocks=(0, 1), at="ffn", tokens="patch", normalize=false, always_align=false, '
        'norm="auto", reduce="sum", target_norm="none"',
        "features(0) 192 → 384 (2×2 ← 4×4), features(1) 192 → 384 (2×2 ← 4×4)",
    )
    assert rows["generate"][-1] == "final 192 → 384 (2×2 ← 4×4)"
    assert rows["labels"][-1] == "logits 24"
    assert rows["nkd"][-1] == "logits 24 → 24"
    moving = Objective("2*kd*cosine(1, 0)", vit(), vit())
    assert term_rows(moving)[0][1] == "2*cosine(start=1, end=0)"
    balanced = Objective("labels + kd(balance=0.1)*cosine(1, 0) + mimic(balance=0.2)", vit(), vit())
    assert [row[1] for row in term_rows(balanced)] == ["1", "share 0.1*cosine(start=1, end=0)", "share 0.2"]
    inner = Objective("mimic(blocks=(2,))", vit(8, depth=3), vit(8, depth=12))
    assert term_rows(inner)[0][-1] == "final ← features(2) 8 → 8"


# ------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("formula", "student", "teacher", "message", "hint"),
    [
        ("labels + kd", vit(), None, "kd compares with a teacher", "--teacher NAME"),
        ("vitkd", vit(), None, "mimic compares with a teacher", "--teacher NAME"),
        ("kd", vit(), vit(classes=0, name="tower"), "tower has no classes", '--loss "labels + vitkd"'),
        ("kd", vit(), vit(classes=0, name="tower"), "tower has no classes", "--finetune-teacher N"),
        ("labels", vit(classes=0, name="bare"), None, "bare has no classes", "--num-classes"),
        ("nkd", vit(classes=0, name="bare"), vit(), "bare has no classes", "--num-classes"),
        ("nkd", vit(classes=2), vit(classes=2), "2 classes", "kd"),
        ("mimic(blocks=(7,))", vit(), vit(depth=12), "has no block 7, its depth is 3", "0 to 2"),
        ("generate(block=-4)", vit(), vit(), "has no block -4, its depth is 3", "-1 to -3"),
        ("generate(mask=1)", vit(), vit(), "mask must be below 1, not 1", "0.5"),
    ],
)
def test_a_formula_that_does_not_fit_the_models_is_refused_with_a_cure(
    formula, student, teacher, message, hint
):
    with pytest.raises(UserError) as refusal:
        Objective(formula, student, teacher)
    assert message in refusal.value.message and hint in refusal.value.hint


def test_other_classes_are_refused_with_both_counts_and_fine_tuning_first():
    with pytest.raises(UserError) as refusal:
        Objective("labels + kd", vit(classes=10, name="small"), vit(classes=1000, name="large"))
    assert "large has 1000 classes where small has 10" in refusal.value.message
    hint = refusal.value.hint
    assert 0 <= hint.index("--finetune-teacher N") < hint.index('--loss "labels + vitkd"')


def test_features_need_no_classes_in_common():
    assert Objective("labels + vitkd", vit(classes=10), vit(classes=0)).warnings == []


def test_nkd_on_few_classes_is_said():
    assert "10 classes" in Objective("nkd", vit(classes=10), vit(classes=10)).warnings[0]


@pytest.mark.parametrize(
    ("loss", "shares", "told"),
    [
        (
            "labels + mimic + generate",
            (0.08, 0.9, 0.02),
            "92.0% of the student's gradient is that of mimic and gen",
        ),
        ("labels + mimic + kd", (0.991, 0.008, 0.001), "0.90% of the student's gradient is the teacher's"),
        ("labels + kd", (0.05, 0.95), ""),  # it teaches the classes, too
        ("labels + mimic", (0.5, 0.5), ""),
        ("labels + mimic*linear(0, 1)", (1, 0), ""),
        ("labels*warmup(epochs=5) + mimic", (0.05, 0.95), ""),
        ("mimic", (1,), ""),
    ],
)
def test_terms_that_drown_the_labels_or_drown_are_told(loss, shares, told):
    objective = Objective(loss, vit(), vit())
    names = [f"{name}/grad_share" for name, _ in objective.named()]
    said = objective.lopsided(dict(zip(names, shares, strict=True)))
    assert said.startswith(told) and bool(said) == bool(told)


def test_a_term_s_buffers_in_float64_stay_as_fine(registry):
    """Such as statistics of the teacher, which a cast to the weights' type would round."""

    @term("fine")
    class Fine(Term):
        def __init__(self, student, teacher):
            super().__init__()
            self.compares = [(LOGITS, LOGITS)]
            self.register_buffer("mean", torch.full((), 1 / 3, dtype=torch.float64))
            self.scale = nn.Module()
            self.scale.register_buffer("third", torch.full((), 1 / 3, dtype=torch.float64))
            self.layer = nn.Linear(10, 10)

        def forward(self, pairs, batch):
            [(student, teacher)] = pairs
            return (self.layer(student) - teacher - self.mean * self.scale.third).square().mean()

    objective = Objective("labels + fine", vit(classes=10), vit(classes=10))
    for dtype in (torch.float64, torch.float32):
        objective.to("cpu", dtype)
        fine = objective.terms["fine"]
        assert fine.mean == fine.scale.third == torch.tensor(1 / 3, dtype=torch.float64)
        assert fine.layer.weight.dtype is dtype
    signals = {LOGITS: torch.randn(2, 10, requires_grad=True)}
    total, _ = objective(signals, {LOGITS: torch.randn(2, 10)}, Batch(torch.tensor([1, 2])))
    total.backward()
    assert objective.terms["fine"].layer.weight.grad.isfinite().all()
