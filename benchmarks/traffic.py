"""What each rule must read and write: the reckoning by hand that the machine code is compared with."""

from __future__ import annotations

__all__ = ["RULE_TRAFFIC"]

RULE_TRAFFIC = {
    "sgd": (2, 1),  # p, g -> p
    "sgd_momentum": (3, 2),
    "sgd_nesterov": (3, 2),
    "sophia": (4, 2),  # p, g, m, hessian -> p, m
    "adahessian": (5, 3),  # p, g, m, v, hessian -> p, m, v
    "adahessian_power": (5, 3),
    "adam": (4, 3),  # p, g, m, v -> p, m, v
    "adam_amsgrad": (5, 4),
    "lion": (3, 2),
    "adan": (6, 5),  # p, g, m, d, n, previous -> p, m, d, n, previous
    "ranger": (5, 4),  # p, g, m, v, slow -> p, m, v, slow
    "ranger_belief": (5, 4),
    "lamb_moments": (4, 2),  # p, g, m, v -> m, v
    "lamb_apply": (3, 1),  # p, m, v -> p
    "stable_moments": (3, 2),  # g, m, v -> m, v
    "stable_apply": (3, 1),
    "rmsprop": (3, 2),  # p, g, v -> p, v
    "rmsprop_momentum": (4, 3),
    "rmsprop_centered": (4, 3),
    "rmsprop_centered_momentum": (5, 4),
    "muon_momentum": (2, 2),  # g, m -> m, what is worked on
    "muon_nesterov": (2, 2),
    "decayed_adam": (4, 3),
    "hand_over": (1, 1),  # g -> what is worked on
    "take_step": (2, 1),  # p, what came of it -> p
    "muon_apply": (2, 1),  # p, what came of it -> p
    "nadam": (4, 3),
    "adopt": (4, 3),
    "adabelief": (4, 3),
    "adabelief_amsgrad": (5, 4),
    "adabound": (4, 3),
    "adabound_amsbound": (5, 4),
    "adamod": (5, 4),  # p, g, m, v, average -> p, m, v, average
    "diffgrad": (5, 4),
    "yogi": (4, 3),
    "ademamix": (5, 4),
    "laprop": (4, 3),
    "mars_norm": (2, 0),  # g, last ->
    "mars": (5, 4),
    "accsgd": (3, 2),
    "aggmo": (5, 4),  # p, g, three momenta -> p, three momenta
    "madgrad": (5, 4),
    "madgrad_plain": (4, 3),
    "pid": (5, 4),
    "qhm": (3, 2),
    "qhadam": (4, 3),
    "rangerqh": (5, 4),  # p, g, m, v, slow -> p, m, v, slow
    "rangerva": (5, 4),
    "rangerva_amsgrad": (6, 5),
    "signsgd": (2, 1),
    "signum": (3, 2),
    "lars_squares": (2, 0),  # p, g ->
    "lars": (2, 1),
    "lars_momentum": (3, 2),
    "lars_nesterov": (3, 2),
    "novograd": (3, 2),  # p, g, m -> p, m
    "a2grad_mean": (4, 2),  # p, g, x, mean -> x, mean
    "a2grad": (4, 3),
    "apollo_products": (4, 0),  # g, m, b, d ->
    "apollo_products decay=l2": (5, 0),
    "apollo": (5, 4),  # p, g, m, b, d -> p, m, b, d
    "apollo_curvature": (2, 0),  # b, d ->
    "apollo_stable": (5, 4),
    "swats_moments": (3, 2),  # g, m, v -> m, v
    "swats_moments decay=l2": (4, 2),
    "swats_moments_amsgrad": (4, 3),
    "swats_moments_amsgrad decay=l2": (5, 3),
    "swats": (4, 3),  # p, g, m, v -> p, m, v
    "swats_amsgrad": (5, 4),
    "amos": (2, 1),
    "amos_momentum": (3, 2),
    "momo_average": (3, 1),  # p, g, d -> d
    "momo_apply": (2, 1),
    "momo_adam_moments": (4, 2),  # p, g, m, v -> m, v
    "momo_adam_apply": (3, 1),
    "momo_adam_prox": (3, 1),
    "prodigy_moments": (6, 4),  # p, g, m, v, s, p0 -> m, v, s, p0
    "prodigy_apply": (3, 1),
    "dadapt_moments": (4, 3),  # g, m, v, s -> m, v, s
    "dadapt_moments decay=l2": (5, 3),
    "dadapt_apply": (3, 1),
    "square_terms": (1, 0),
    # stages that see axes: rows and columns of factors beside them count for nothing
    "plain_moment": (3, 1),  # p, g, v -> v
    "plain_apply": (3, 1),
    "factored_squares": (2, 0),  # p, g ->
    "factored_measure": (1, 0),  # g ->
    "factored_apply": (2, 1),
    "adamp_plain": (4, 3),
    "adamp_moments": (4, 2),  # p, g, m, v -> m, v
    "adamp_apply": (4, 1),
    "sgdp_plain": (3, 2),
    "sgdp_momentum": (3, 1),  # p, g, b -> b
    "sgdp_apply": (3, 1),
    "gradient_rows": (1, 0),
    "ranger_centred": (5, 4),
    "ranger_belief_centred": (5, 4),
    "came_plain_moment": (3, 2),  # g, m, v -> m, v
    "came_plain_update": (4, 3),
    "came_squares": (1, 0),
    "came_measure": (1, 0),
    "came_momentum": (2, 1),  # g, m -> m
    "came_apply": (2, 1),
    "mini_squares": (1, 0),
    "mini_update": (3, 2),
    "ranger21_sums": (2, 0),  # p, g ->
    "ranger21_variance": (5, 4),  # g, all state -> all state, though only the variance changes
    "ranger21_apply": (6, 5),
    "apollo_products_belief": (4, 0),
    "schedule_free_sgd": (3, 2),
    "schedule_free_adamw": (4, 3),
    "sm3_vector": (3, 2),
    "sm3_vector_momentum": (4, 3),
    "sm3_measure": (1, 0),
    "sm3_apply": (2, 1),
    "sm3_apply_momentum": (3, 2),
    "lamb_apply agreement": (4, 0),  # the gradient too, for the sign
    "lamb_apply cautious": (4, 1),
}
"""Tensors read and written for each element. A new rule adds its line; with L2 decay a line of its own where that reads
the parameter beside the rule."""
