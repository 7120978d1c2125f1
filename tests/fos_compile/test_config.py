"""Options: what is accepted, what is refused and how, and that each one reaches the cache key."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import MLP, bf16, tokens_of
from torch import nn

from fos_compile.backend import GraphPasses
from fos_compile.config import BackendConfig, parse_options
from fos_compile.kernels.errors import InvalidArgument
from fos_compile.passes.recipe import OperandSpec, PassConfig, Recipe
from fos_compile.recipes import RECIPES

OTHER_RECIPE = Recipe(name="other", fprop_weight=OperandSpec(scale_rule="mae"))

CHANGES = {
    "recipe": "nvfp4",
    "scale_rule": "static_6",
    "skip": ["up"],
    "default_skip": [],
    "overrides": {"up": "bf16"},
    "min_weight_dim": 32,
    "save_packed_weights": True,
    "compiler": "eager",
    "mode": "reduce-overhead",
    "lowering": "opaque",
    "exact": False,
    "inductor": {"max_autotune": True},
    "strict": True,
}
"""A value other than the default for every option."""

SPEC_CHANGES = {
    "format": "mxfp4",
    "scale_rule": "static_6",
    "rounding": "stochastic",
    "block": "2d",
    "rht": True,
}


def uuid(options: dict[str, object] | BackendConfig) -> str:
    config = options if isinstance(options, BackendConfig) else parse_options(options)
    gm = torch.fx.symbolic_trace(MLP())
    return GraphPasses(config, gm, [tokens_of()]).uuid


def test_every_option_has_a_change_below():
    """The parametrized tests over CHANGES cover every field."""
    assert set(CHANGES) == {field.name for field in dataclasses.fields(BackendConfig)}
    assert set(SPEC_CHANGES) == {field.name for field in dataclasses.fields(OperandSpec)}


@pytest.mark.parametrize("option", CHANGES)
def test_every_option_changes_the_cache_key(option):
    assert uuid({option: CHANGES[option]}) != uuid({})
    assert uuid({option: CHANGES[option]}) == uuid({option: CHANGES[option]})


@pytest.mark.parametrize("field", SPEC_CHANGES)
@pytest.mark.parametrize("where", ["recipe", "overrides"])
def test_every_field_of_a_spec_changes_the_cache_key(field, where):
    # static_6 is what mxfp4 accepts; the rule itself changes to another value.
    base = OperandSpec(scale_rule="static_4" if field == "scale_rule" else "static_6")
    changed = dataclasses.replace(base, **{field: SPEC_CHANGES[field]})

    def key(spec: OperandSpec) -> str:
        activation = dataclasses.replace(spec, block="1d")
        recipe = Recipe(name="r", fprop_activation=activation, fprop_weight=spec)
        return uuid({where: recipe if where == "recipe" else {"up": recipe}})

    assert key(changed) != key(base)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Recipe)])
def test_every_field_of_a_recipe_changes_the_cache_key(field):
    base = Recipe(name="r")
    value = "s" if field == "name" else OperandSpec()
    assert uuid({"recipe": dataclasses.replace(base, **{field: value})}) != uuid({"recipe": base})


def test_every_field_of_the_pass_config_comes_from_an_option():
    """A field that no option reaches could change a graph without changing its cache key; the kind
    of the graph, which `given_weights` comes from, is in the key beside the options."""
    default = BackendConfig().pass_config(training=False)
    changed = BackendConfig(
        recipe=OTHER_RECIPE, overrides=(("up", OTHER_RECIPE),), skip=("up",), min_weight_dim=1,
        save_packed_weights=True, lowering="opaque", strict=True,
    ).pass_config(training=False, given_weights=False)  # fmt: skip
    for field in dataclasses.fields(PassConfig):
        assert getattr(default, field.name) != getattr(changed, field.name), field.name


def test_module_paths_and_parameters_change_the_cache_key():
    """Decisions read them; the graph's code does not show them."""
    first, second = (torch.fx.symbolic_trace(MLP()) for _ in range(2))
    for gm, name in ((first, "up"), (second, "down")):
        node = next(n for n in gm.graph.nodes if n.op == "call_module")
        with gm.graph.inserting_after(node):
            relu = gm.graph.call_function(torch.relu, (node,))
        relu.meta["nn_module_stack"] = {"m": (f"L['self'].{name}", MLP)}
    config, x = BackendConfig(), tokens_of()
    assert GraphPasses(config, first, [x]).uuid != GraphPasses(config, second, [x]).uuid
    as_parameter = GraphPasses(config, first, [nn.Parameter(x)]).uuid
    assert as_parameter != GraphPasses(config, first, [x]).uuid
    assert (
        GraphPasses(config, first, [x], is_fragment=True).uuid
        != GraphPasses(config, first, [x]).uuid
    )


@pytest.mark.parametrize(
    "options, listed",
    [
        ({"recpie": "training"}, [f.name for f in dataclasses.fields(BackendConfig)]),
        ({"recipe": "fp3"}, RECIPES),
        ({"recipe": ["training"]}, RECIPES),
        ({"overrides": {"up": "fp3"}}, RECIPES),
        ({"scale_rule": "best"}, ["mse", "mae", "abs_max", "static_6", "static_4"]),
        ({"compiler": "gcc"}, ["inductor", "eager"]),
        ({"lowering": "off"}, ["outline", "inline", "opaque"]),
        ({"mode": "fastest"}, ["default", "reduce-overhead", "max-autotune"]),
        ({"skip": "lm_head"}, ["a list of module-path globs"]),
        ({"default_skip": [1]}, ["a list of module-path globs"]),
        ({"skip": None}, ["a list of module-path globs"]),
        ({"compiler": None}, ["inductor", "eager"]),
        ({"lowering": None}, ["outline", "inline", "opaque"]),
        ({"min_weight_dim": "64"}, ["of type int"]),
        ({"strict": "no"}, ["of type bool"]),
        ({"exact": None}, ["of type bool"]),
        ({"overrides": ["up"]}, ["a dict"]),
        ({"inductor": "fast"}, ["a dict"]),
        ({"inductor": {"bogus": 1}}, ["torch._inductor.config", "'bogus'"]),
        ({"inductor": {3: 4}}, ["a dict with text as keys"]),
        ({3: 4}, ["min_weight_dim"]),
        ({"overrides": (("a", 1, 2),)}, ["a dict"]),
        ({"overrides": {3: "bf16"}}, ["a dict with text as keys"]),
        ({"skip": {"a": 1}}, ["a list of module-path globs"]),
        ({"min_weight_dim": -5}, ["0 or more"]),
        ("abc", ["options must be a dict"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_errors_list_what_is_valid(options, listed):
    with pytest.raises(InvalidArgument) as caught:
        parse_options(options)
    text = str(caught.value)
    assert all(name in text for name in listed), text
    assert "got " in text


def test_unknown_mode_keyword_lists_the_modes():
    with pytest.raises(InvalidArgument, match=r"reduce-overhead.*got fastest"):
        parse_options(None, "fastest")


def test_a_mode_needs_inductor():
    with pytest.raises(InvalidArgument, match="compiler='inductor'"):
        parse_options({"compiler": "eager", "mode": "max-autotune"})


@pytest.mark.parametrize(
    "field, value",
    [("format", "fp4"), ("scale_rule", "best"), ("rounding", "up"), ("block", "3d")],
)
def test_a_spec_refuses_unknown_values(field, value):
    with pytest.raises(InvalidArgument, match=rf"{field} must be one of .*got {value}"):
        OperandSpec(**{field: value})


@pytest.mark.parametrize(
    "field", ["fprop_activation", "dgrad_gradient", "wgrad_gradient", "wgrad_activation"]
)
def test_tiles_are_for_weights(field):
    with pytest.raises(InvalidArgument, match=rf"{field} block must be 1d, got 2d in recipe 'r'"):
        Recipe(name="r", **{field: OperandSpec(block="2d")})


def test_mxfp4_has_static_rules_only():
    with pytest.raises(InvalidArgument, match="scale_rule static_6"):
        OperandSpec(format="mxfp4")


@pytest.mark.parametrize("field", ["format", "rht"])
def test_operands_of_a_product_agree(field):
    one = OperandSpec(scale_rule="static_6")
    other = dataclasses.replace(one, **{field: SPEC_CHANGES[field]})
    with pytest.raises(InvalidArgument, match=f"fprop {field}.*same for both operands"):
        Recipe(name="r", fprop_activation=one, fprop_weight=other)


def test_rht_on_one_operand_alone_never_cancels():
    with pytest.raises(InvalidArgument, match="both operands or on none"):
        Recipe(name="r", wgrad_activation=OperandSpec(rht=True))


def test_environment_names_the_default_recipe(monkeypatch):
    monkeypatch.setenv("FOS_RECIPE", "weight_only")
    assert parse_options({}).recipe == RECIPES["weight_only"]
    assert parse_options({"recipe": "nvfp4"}).recipe == RECIPES["nvfp4"]
    monkeypatch.setenv("FOS_RECIPE", "fp3")
    with pytest.raises(InvalidArgument, match=r"FOS_RECIPE must be one of inference.*got 'fp3'"):
        parse_options({})


def test_torch_compile_refuses_both_keywords():
    with pytest.raises(RuntimeError, match=r"[Ee]ither mode or options"):
        torch.compile(
            MLP(), backend="fouroversix", mode="reduce-overhead", options={"recipe": "training"}
        )


@pytest.mark.parametrize("options", [{"recipe": "fp3"}, {"recpie": "training"}])
def test_bad_options_reach_the_user_through_torch_compile(options):
    with pytest.raises(Exception, match=r"inference, training, nvfp4|min_weight_dim"):
        torch.compile(bf16(MLP()), backend="fouroversix", options=options)(tokens_of())
