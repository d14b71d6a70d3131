"""The published configurations give the published parameter counts, to the printed digits."""

import pytest

from fedsim.cli.compose import compose
from fedsim.core.adapters import adapter_spec
from fedsim.core.cost import forecast
from fedsim.effective import effective, method_of
from fedsim.published import MISTRAL_7B, PUBLISHED, published
from fedsim.shapes import layer_shapes


def forecast_parameters(found):
    config = effective(compose(["model=mistral_7b", f"method={found.method}", f"adapter.rank={found.rank}", "federation.rounds=1"]))
    method = method_of(config)
    spec = adapter_spec(layer_shapes(config.model, []), method.form, config.adapter.rank, 1, 1.0)
    assert published(found.method, spec.rank, config.federation.clients, spec.layers.values()) is found
    cost = forecast(config, method, spec)
    return (cost.down if found.down else cost.up).parameters


@pytest.mark.parametrize("found", PUBLISHED, ids=lambda found: f"{found.method}-{found.rank}")
def test_published_counts_equal_the_traffic_or_are_explained(found):
    decimals = len(found.millions.partition(".")[2])
    assert (f"{forecast_parameters(found) / 1e6:.{decimals}f}" == found.millions) == (not found.differs)


def test_explanations_of_differing_counts_contain_the_right_numbers():
    by_method = {found.method: found for found in PUBLISHED}
    lora = forecast_parameters(by_method["fedit"])
    assert f"{lora / 2e6:.1f}" == by_method["ffa_lora"].millions
    assert f"{forecast_parameters(by_method['ffa_lora']) / 1e6:.1f} M" in by_method["ffa_lora"].differs
    assert f"{(forecast_parameters(by_method['fedex_lora']) - lora) / 1e6:.0f}" == by_method["fedex_lora"].millions
    assert f"{lora / 1e6:.1f} M" in by_method["fedex_lora"].differs


def test_other_models_ranks_and_numbers_of_clients_have_no_published_counts():
    shapes = list(MISTRAL_7B.elements())
    assert published("fedit", 32, 25, shapes) is not None
    assert published("fedit", 32, 24, shapes) is None
    assert published("fedit", 16, 25, shapes) is None
    assert published("fedit", 32, 25, shapes[1:]) is None
    assert published("flexlora", 32, 25, shapes) is None
