"""Predictors for tests, and the paper's sampling with them."""

import torch

from lesa import LesaConfig, LesaPredictor


def random_predictor(config, seed=0):
    """A float64 predictor with random weights as large as trained ones: gates around 1, window weights up to 3."""
    torch.manual_seed(seed)
    predictor = LesaPredictor(config).double()
    with torch.no_grad():
        for layer in predictor.latent:
            layer.weight.normal_(std=1.0)
            layer.bias.normal_(std=0.1)
        for gate in predictor.timestep:
            gate.layers[-1].base_weight.normal_(std=0.5)
            gate.layers[-1].spline_weight.normal_(std=0.5)
    return predictor


def closed_loop(predictor, plan, times, features):
    """The paper's sampling: a window of the latest features, into which every prediction is written back."""
    window, made = [], []
    for step in range(plan.num_steps):
        if plan.is_full(step):
            window.append(features[step])
        else:
            window.append(predictor(torch.stack(window), times, times[step]))
            made.append(window[-1])
    return torch.stack(made)


def kan_predictor(steps=10, channels=6):
    """A float64 predictor with a random KAN on the features."""
    predictor = random_predictor(LesaConfig(steps, hidden_dim=8, latent="kan"))
    predictor.scale = torch.rand(channels, dtype=torch.float64) + 0.5
    with torch.no_grad():
        for layer in predictor.latent:
            layer.base_weight.normal_(std=0.3)
            layer.spline_weight.normal_(std=0.3)
    return predictor
