import json

import pytest

from fedsim.choices import Init
from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.plain import from_dict, to_dict


def test_a_configuration_survives_json():
    config = Config(seed=7)
    config.adapter.init = Init.orthogonal
    config.adapter.target_modules = ["q_proj"]
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_and_missing_names_are_refused():
    values = to_dict(Config())
    values["federation"]["cliants"] = values["federation"].pop("clients")
    with pytest.raises(UserError, match="difference in cliants, clients"):
        from_dict(Config, values)
