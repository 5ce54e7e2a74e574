"""Which linear layers of a model are adapted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy
from ..anatomy.storage import shape_of
from ..errors import TransectError

Shape = tuple[int, int]


def linear_layers(host: nn.Module) -> list[str]:
    """Paths, within `host`, of the linear layers whose weight no other module shares."""
    uses = Counter(id(parameter) for _, parameter in host.named_parameters(remove_duplicate=False))
    return [
        path
        for path, module in host.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.numel() and uses[id(module.weight)] == 1
    ]


def targets_of(anatomy: Anatomy, roles: Sequence[str] | None) -> dict[str, Shape]:
    """Path from the model's root -> (d_out, d_in) of each linear layer of the blocks, or of those with these roles.

    The factors of a low-rank layer are linear layers, too. Where a model stores several roles in one layer, all or none
    of them are adapted. TransectError if there is nothing to adapt, or a role is none that this model has.
    """
    model, blocks = anatomy.model, anatomy.block_list
    (root,) = [path for path, module in model.named_modules() if module is blocks]
    found = [f"{root}.{path}" for path in linear_layers(blocks)]
    if roles is not None:
        hosts: dict[str, set[str]] = {}
        for matrix in anatomy.matrices():
            hosts.setdefault(matrix.path, set()).add(matrix.role)
        known = sorted(set().union(*hosts.values()))
        if unknown := [role for role in roles if role not in known]:
            raise TransectError(f"this model has no matrices {', '.join(unknown)}; it has: {', '.join(known)}")
        chosen = {path: held for path, held in hosts.items() if held & set(roles)}
        for path, held in chosen.items():
            if not held <= set(roles):
                raise TransectError(
                    f"{path} stores {', '.join(sorted(held))} in one layer, so that they are adapted together: name all"
                )
        found = [path for path in found if any(path == host or path.startswith(f"{host}.") for host in chosen)]
    if not found:
        raise TransectError("the model's blocks have no linear layer that could be adapted")
    return {path: shape_of(model.get_submodule(path)) for path in found}
