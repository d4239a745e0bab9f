"""What is varied becomes the right recipes, or is refused before anything runs."""

from __future__ import annotations

import pytest

from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Recipe
from vitkd_cli.requests import SweepRequest
from vitkd_cli.sweeps.folder import SweepFolder, asked_in
from vitkd_cli.sweeps.points import axes_of, points_of, vary_in_words
from vitkd_cli.training.arms import formula_of

PAPER = "labels + vitkd(alpha={a}, beta={b})"


def points(*vary, drawn=None, seed=0, **values):
    recipe = Recipe(**values)
    return points_of(recipe, axes_of(vary, recipe, bool(drawn)), drawn, seed)


def test_a_grid_has_every_combination_and_the_default():
    found = points("lr=1e-3,2e-3", "weight_decay=0,0.1,0.2")
    assert [(p.recipe.lr, p.recipe.weight_decay) for p in found[1:]] == [
        (lr, decay) for lr in (1e-3, 2e-3) for decay in (0, 0.1, 0.2)
    ]
    assert found[0].default and found[0].place == "default" and found[0].recipe == Recipe()
    assert found[1].place == "lr=0.001_weight_decay=0"


def test_a_folder_is_named_so_that_no_two_formulas_share_one():
    own, *others = (p.place for p in points("loss=labels,labels + kd,labels + kd/2,labels + kd*2")[1:])
    assert (own, others[0]) == ("loss=labels", "loss=labels+kd")
    assert len({*others}) == 3 and all(place.startswith("loss=labels+kd") for place in others)


def test_the_default_of_a_formula_leaves_its_places_out():
    first, *rest = points("a=1e-5,3e-5", "b=1e-6,3e-6", loss=PAPER)
    assert first.default and first.recipe.loss == "labels + vitkd"
    assert first.values == {"a": "3e-5", "b": "3e-6"}  # it is one of the grid, under the grid's name
    assert [p.name for p in rest] == ["a=1e-5, b=1e-6", "a=1e-5, b=3e-6", "a=3e-5, b=1e-6"]
    assert rest[0].recipe.loss == "labels + vitkd(alpha=1e-5, beta=1e-6)"
    (first, *_) = points("w=2,3", "n=raw,final", loss='labels + {w}*mimic(norm="{n}", blocks=(0, 1))')
    assert formula_of(first.recipe) == formula_of(Recipe(loss="labels + mimic(blocks=(0, 1))"))
    assert first.values == {"w": "1", "n": "auto"}
    assert points("w=2,3", loss="{w}*labels + dkd(beta={w})")[0].values == {"w": None}  # is 1 and 0.5


def test_values_with_commas_stand_in_brackets_or_quotes():
    found = points("scale=(0.3,1),(0.5,1)", 'aa=none,"rand-m9,x"', "hflip=0")[1:]
    assert {p.recipe.scale for p in found} == {(0.3, 1.0), (0.5, 1.0)}
    assert {p.recipe.aa for p in found} == {"none", "rand-m9,x"}
    formulas = [p.recipe.loss for p in points("loss=labels + dkd(alpha=1, beta=2),labels")[1:]]
    assert formulas == ["labels + dkd(alpha=1, beta=2)", "labels"]


def test_a_table_in_a_file_says_what_the_flag_does(tmp_path):
    words = vary_in_words({"scale": [[0.3, 1.0], [0.5, 1.0]], "aa": ["none", "a,b"], "lr": 2e-3})
    assert words == ["scale=(0.3,1),(0.5,1)", 'aa=none,"a,b"', "lr=0.002"]
    file = tmp_path / "s.toml"
    file.write_text("epochs = 3\n[vary]\nlr = [1e-3, 2e-3]\nhflip = [0.0]\n[sweep]\nrandom = 3\njobs = 2\n")
    asked = asked_in(file, SweepRequest(vary=("lr=5e-4,1e-2",), jobs=1), {"vary", "jobs"})
    assert asked.vary == ("lr=5e-4,1e-2", "hflip=0") and asked.random == 3
    assert asked.jobs == 1  # as was typed, although it is the default
    assert asked_in(file, SweepRequest(), ()).jobs == 2
    file.write_text("[sweep]\nrandm = 3\n")
    with pytest.raises(UserError, match=r"\[sweep\] has no randm .*did you mean random"):
        asked_in(file, SweepRequest(), ())


def test_what_is_drawn_hangs_on_the_seed_alone():
    vary = ("lr=1e-4..1e-2", "weight_decay=0..0.2", "epochs=5..20", "sched=cosine,step")
    some, more, other = (points(*vary, drawn=n, seed=s)[1:] for n, s in ((4, 0), (40, 0), (4, 1)))
    assert [p.values for p in some] == [p.values for p in more[:4]]
    assert [p.values for p in some] != [p.values for p in other]
    rates = [p.recipe.lr for p in more]
    assert all(1e-4 <= lr <= 1e-2 for lr in rates) and 10 < sum(lr < 1e-3 for lr in rates) < 30  # by decades
    assert all(isinstance(p.recipe.epochs, int) and 5 <= p.recipe.epochs <= 20 for p in more)
    assert len(points("lr=1e-3,2e-3", "hflip=0,1", drawn=9)) == 5  # no more than there are, and the default


@pytest.mark.parametrize(
    ("vary", "values", "said"),
    [
        ([], {}, "nothing is varied"),
        (["lr"], {}, "it has no values"),
        (["lrr=1,2"], {}, r"neither the recipe nor its formula has that \(did you mean lr\?"),
        (["alfa=1,2"], {"loss": PAPER}, "neither the recipe nor its formula"),
        (["a=1,2"], {"loss": PAPER}, r"the formula's \{b\} is not varied"),
        (["lr=1,fast"], {}, "--vary lr must be a number, not 'fast'"),
        (["lr=1e-3,0.001"], {}, "gives 0.001 twice"),
        (["lr=1", "lr=2"], {}, "--vary gives lr twice"),
        (["loss=labels + kd,kd + labels"], {}, "'loss=labels \\+ kd' and 'loss=kd \\+ labels' are one run"),
        (["loss=labels + kd,labels + 1*kd"], {}, "are one run"),
        (["teacher=B,b"], {}, "would have one folder"),
        (["seeds=1,2"], {}, "have it in common"),
        (["data=a,b"], {}, "have it in common"),
        (["lr=1,,2"], {}, "a value is empty"),
        (["scale=0.3,1"], {}, r"brackets around each value: --vary \"scale=\(0.3,1\),"),
        (["scale=(0.3,1"], {}, "a bracket or quote is open"),
        (["lr=1e-4..1e-2"], {}, "a range has no grid"),
        (["w=1,x"], {"loss": "labels + {w}*kd"}, "the point w=x"),
        (["t=1,-1"], {"loss": "labels + kd(temperature={t})"}, "temperature must be above 0.*the point t=-1"),
        (["w=1,2"], {"loss": "labels + kd*cosine({w}, 0)"}, r"no default without \{w\}"),
        (["lr=1,2"], {"loss": "labels + {lr}*kd"}, "called like a setting of the recipe"),
        (["loss=labels,{w}*kd"], {}, r"takes no \{names\}"),
        (["warmup_epochs=1,400"], {}, "beyond the 300 epochs.*the point warmup_epochs=400"),
    ],
)
def test_what_is_wrong_is_refused_with_its_name(vary, values, said):
    with pytest.raises(UserError, match=said):
        points(*vary, **values)


def test_one_teacher_serves_all_points_unless_it_is_varied(tmp_path):
    recipe = Recipe(teacher="vit_tiny", student="vit_tiny", finetune_teacher=3, baseline=True)
    layout = SweepFolder.of(SweepRequest(recipe, vary=("lr=1e-3,2e-3",)), tmp_path)
    default, other = (layout.recipe_for(point) for point in layout.points[:2])
    assert default.finetune_teacher == 3 and default.baseline
    assert other.teacher == str(tmp_path / "points/default/teacher/student")
    assert other.finetune_teacher == 0 and not other.baseline
    layout = SweepFolder.of(SweepRequest(recipe, vary=("teacher=vit_small,vit_base",)), tmp_path)
    assert {layout.recipe_for(point).finetune_teacher for point in layout.points} == {3}
