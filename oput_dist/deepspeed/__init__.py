"""DeepSpeed: any optimizer of the suite by its name in the configuration, at every ZeRO stage.

Importing this makes ``{"optimizer": {"type": "oput.Lamb", "params": {"lr": 1e-3}}}`` work, in any case, for every class
and named configuration; and instances and callables that are given to ``deepspeed.initialize``::

    import deepspeed
    import oput_dist.deepspeed

    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

One ``engine.step()`` is one step of the optimizer, over all parameters at once, whatever DeepSpeed flattened and cut.
See ``docs/deepspeed.md``.
"""

from .registration import ConfigError, register
from .whole import full_state_dict, load_full_state_dict

__all__ = ["ConfigError", "full_state_dict", "load_full_state_dict", "register"]

register()
