"""The server's side of a round: takes in uploads one at a time and keeps only what the method needs.

The mean keeps one float64 sum, and the mean of dense updates one dense sum, for any number of clients. Only stacked factors and robust
rules keep every client's upload.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import nan, sqrt

import torch
from torch import Tensor

from fedsim.choices import Residual
from fedsim.config import MethodConfig
from fedsim.core.decomposition import truncated_svd
from fedsim.core.forms import AdapterSpec
from fedsim.types import Adapter

Rule = Callable[[Tensor, Tensor], Tensor]
"""A robust rule: (updates [clients, parameters], weights [clients]) -> one flat update [parameters]."""


class WeightedMean:
    """sum_i w_i x_i / sum_i w_i over flat vectors, in float64; each entry is averaged over the clients that sent it."""

    def __init__(self, num_parameters: int) -> None:
        self._total = torch.zeros(num_parameters, dtype=torch.float64)
        self._weight = 0.0  # of the clients that sent every entry
        self._weights: Tensor | None = None  # by entry, of the others

    def add(self, weight: float, flat: Tensor, positions: Tensor | None = None) -> None:
        """Adds one client's entries: all, or those at `positions`."""
        if positions is None:
            self._total.add_(flat, alpha=weight)
            self._weight += weight
            return
        self._total.index_add_(0, positions, flat.double(), alpha=weight)
        if self._weights is None:
            self._weights = torch.zeros_like(self._total)
        self._weights.index_add_(0, positions, torch.full((len(positions),), weight, dtype=torch.float64))

    def result(self, otherwise: Tensor) -> Tensor:
        """Returns the mean as float32, with entries that no client sent from `otherwise`. Raises ValueError if no client sent any."""
        if self._weights is None and self._weight <= 0:
            raise ValueError(f"Expected at least one client with a positive weight, got a total weight of {self._weight}.")
        if self._weights is None:
            return (self._total / self._weight).float()
        weights = self._weights + self._weight
        return torch.where(weights > 0, self._total / weights.clamp(min=torch.finfo(torch.float64).tiny), otherwise.double()).float()

    def change(self, origin: Tensor) -> Tensor:
        """Returns sum_i w_i (x_i - origin) in float64, if every client sent every entry; zeros without clients."""
        return self._total - self._weight * origin.double()

    @property
    def has_all_entries(self) -> bool:
        """Whether every client so far has sent every entry."""
        return self._weights is None

    def weights(self) -> Tensor:
        """Returns the summed weight of the clients that sent each entry, [parameters]."""
        return torch.full_like(self._total, self._weight) + (0.0 if self._weights is None else self._weights)


@dataclass
class Collected:
    """The server's data once all replies are in. `factors` holds all kinds, with the averaged ones in place of the start's."""

    spec: AdapterSpec
    factors: Adapter
    seed: int
    round: int
    options: MethodConfig
    shares: list[float] = field(default_factory=list)  # p_i in the order of arrival
    products: Adapter = field(default_factory=dict)  # {layer: [out, in]} mean of the clients' dense updates, if kept
    clients: list[Adapter] = field(default_factory=list)  # their factors, if kept

    def product(self, layer: str) -> Tensor:
        """Returns sum_i p_i s B_i A_i of a layer, [out, in] float32."""
        if not self.shares:
            return self.spec.update(self.factors, layer)  # no client sent anything
        if self.products:
            return self.products[layer].float()
        left, right = self.stack(layer)
        return left @ right

    def stack(self, layer: str, less: Adapter | None = None) -> tuple[Tensor, Tensor]:
        """Returns U = [B_1 .. B_c] and V = [p_1 s (A_1 - A); ..], where A is from `less`, or zero."""
        shift = less[f"{layer}.A"] if less else 0.0
        left = torch.cat([client[f"{layer}.B"] for client in self.clients], dim=1)
        scaled = [p * self.spec.scaling * (client[f"{layer}.A"] - shift) for p, client in zip(self.shares, self.clients, strict=True)]
        return left, torch.cat(scaled)

    def fold(self, less: Adapter | None = None) -> Adapter:
        """Returns sum_i p_i s B_i A_i - s B A, with B and A of `less` or zero: {layer}.W, or {layer}.U and {layer}.V by `method.residual`.

        With `method.residual_rank` it is the truncated SVD, the best approximation of that rank.
        """
        result: Adapter = {}
        for layer in self.spec.layers if self.shares else ():
            if self.clients and self.options.residual_rank is None:
                result[f"{layer}.U"], result[f"{layer}.V"] = self.stack(layer, less)
                continue
            dense = self.product(layer) - (self.spec.update(less, layer) if less else 0.0)
            if self.options.residual_rank is None:
                result[f"{layer}.W"] = dense
            else:
                left, values, result[f"{layer}.V"] = truncated_svd(dense, self.options.residual_rank, self.seed, layer)
                result[f"{layer}.U"] = left * values
        return result


class Collector:
    """Collects a round's uploads, one client at a time. The round starts from `start` (all kinds); `origin` is its flat array of `kinds`.

    `keep_products` keeps the mean of the clients' dense updates, `keep_clients` the clients' factors.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        kinds: Sequence[str],
        start: Adapter,
        origin: Tensor,
        options: MethodConfig,
        *,
        keep_products: bool,
        keep_clients: bool = False,
        rule: Rule | None = None,
    ) -> None:
        self._spec, self._start, self._origin, self._options = spec, start, origin, options
        self._layout = spec.layout(kinds)
        self._mean = WeightedMean(self._layout.num_parameters)
        self._rule = rule
        self._uploads: list[Tensor] = []  # for the rule
        self._keep_products, self._keep_clients = keep_products, keep_clients
        self._products: Adapter = {}
        self._clients: list[Adapter] = []
        self._weights: list[float] = []
        self._squares = 0.0  # sum_i w_i |x_i - start|^2

    def add(self, weight: float, flat: Tensor, positions: Tensor | None = None, distance: float | None = None) -> None:
        """Adds one client's upload: all entries of the uploaded kinds, or those at `positions`; `distance` is that from the origin."""
        self._weights.append(weight)
        self._mean.add(weight, flat, positions)
        if distance is None:
            distance = float(torch.dist(flat, self._origin if positions is None else self._origin[positions]))
        self._squares += weight * distance**2
        if self._rule is not None:
            self._uploads.append(flat.clone())
        if self._keep_products or self._keep_clients:
            whole = flat if positions is None else torch.zeros_like(self._origin).index_copy_(0, positions, flat)
            self._keep(weight, self._start | self._layout.unpack(whole), positions)

    def _keep(self, weight: float, client: Adapter, positions: Tensor | None) -> None:
        if self._keep_clients:
            self._clients.append(client if positions is None else self._trimmed(client))
            return
        for layer in self._spec.layers:
            update = self._spec.update(client, layer)
            if layer not in self._products:
                self._products[layer] = torch.zeros(update.shape, dtype=torch.float64)
            self._products[layer].add_(update, alpha=weight)

    def _trimmed(self, client: Adapter) -> Adapter:
        """Returns A and B cut to the client's own rank: the rows of A beyond it are zero in every layer."""
        used = torch.stack([client[f"{layer}.A"].any(dim=1) for layer in self._spec.layers]).any(dim=0)
        rank = int(used.nonzero().max()) + 1 if used.any() else 1
        own = self._spec.pick(client, self._spec.form.kinds)
        return {name: tensor[:rank] if name.endswith(".A") else tensor[:, :rank] for name, tensor in own.items()}

    def mean(self) -> Tensor:
        """Returns the new flat factors of the uploaded kinds: the weighted mean, or the result of the robust rule."""
        if self._rule is None:
            return self._mean.result(self._origin)
        if not self._uploads:
            raise ValueError("Expected at least one client, got none.")
        return self._rule(torch.stack(self._uploads), torch.tensor(self._weights))

    def change(self) -> Tensor:
        """Returns the weighted sum of the clients' changes since the start of the round, float64, if all sent every entry."""
        return self._mean.change(self._origin)

    def drift(self) -> float:
        """Returns the clients' drift: root of sum_i p_i |x_i - mean|^2 over |mean - start|, x the uploaded factors; nan if mean = start.

        An entry that a client does not send adds nothing to its distance.
        """
        if not self._weights:
            return nan
        steps, total = (self._mean.result(self._origin) - self._origin).double().square_(), sum(self._weights)
        moved = float(steps.sum())
        of_mean = moved if self._mean.has_all_entries else float(self._mean.weights() @ steps) / total
        return sqrt(max(0.0, self._squares / total - of_mean) / moved) if moved else nan

    def collected(self, new: Tensor, seed: int, round: int) -> Collected:
        """Returns the input of a method's `finish`; to be called once. `new` are the flat uploaded factors that replace the start's."""
        total = sum(self._weights)
        products = {layer: dense.div_(total) for layer, dense in self._products.items()}  # in place: as large as the model
        self._products = {}
        shares = [weight / total for weight in self._weights]
        factors = self._start | {name: tensor.clone() for name, tensor in self._layout.unpack(new).items()}
        return Collected(self._spec, factors, seed, round, self._options, shares, products, self._clients)


def keeps_clients(options: MethodConfig, folds: bool) -> bool:
    """Whether the server keeps the clients' factors, to stack them for `Collected.fold`."""
    return folds and options.residual is Residual.stacked and options.residual_rank is None
