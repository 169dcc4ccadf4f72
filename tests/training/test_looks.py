"""A kind has one color everywhere."""

import pytest

from quweit_jax.layers import mlp
from quweit_jax.models import registry
from quweit_jax.report import figures
from quweit_jax.training import looks


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_model_and_mixer_has_a_color(name):
    for mixer in mlp.kinds():
        found = looks.color_of_kind(looks.kind_of({"name": name, "mlp": mixer}))
        assert found is not None and 0 <= found < len(looks.SERIES)


def test_a_study_and_a_report_agree():
    for kind, model in (
        ("lookup_glu_320", {"name": "gpt", "mlp": "lookup_glu"}),
        ("quweit", {"name": "gpt", "mlp": "weightless"}),
        ("gpt", {"name": "gpt", "mlp": "dense"}),
        ("dense_unit", {"name": "vit", "mlp": "dense"}),
        ("matmulfree_weightless", {"name": "matmulfree", "mlp": "weightless"}),
        ("integer_weightless", {"name": "vit", "mlp": "weightless"}),
        ("transformer_pp", {"name": "transformer_pp", "mlp": "dense"}),
    ):
        assert looks.color_of_kind(kind) == looks.color_of_kind(looks.kind_of(model))
    different = ("lookup_glu", "gpt", "quweit", "transformer_pp", "matmulfree", "dwn", "none")
    assert len({looks.color_of_kind(kind) for kind in different}) == len(different)
    assert all(light in figures.SERIES for light, _ in looks.SERIES)


def test_curves_of_one_plot_can_be_told_apart():
    kinds = ["dense", "dense_unit", "gpt", "lr=1e-3", "lr=2e-3", "lookup_glu"]
    found = [(look["color"], look["marker"]) for look in looks.styles(kinds)]
    assert len(set(found)) == len(kinds)
    assert found[0][0] == found[1][0] == found[2][0] != found[5][0]
