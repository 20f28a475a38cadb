"""Which modules of a model get an adapter: the targets' names, and the groups that stand for several."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.nn as nn

from mlx_sft.console import many
from mlx_sft.errors import UserError
from mlx_sft.methods.also_train import whole_modules
from mlx_sft.methods.layers import in_layers
from mlx_sft.methods.lora_settings import GROUPS, LoraSettings, is_embedding, is_named
from mlx_sft.methods.peft_rules import ROUTERS, in_a_layer
from mlx_sft.model.head import EMBEDDING_KINDS, HEAD, tied_embedding
from mlx_sft.model.linears import is_joined, linear_modules
from mlx_sft.model.names import EXPERTS_PART, transformers_name


def check_ranks(settings: LoraSettings, shapes: list[tuple[int, ...]], chosen: list[str]) -> None:
    """Raise `UserError` for a rank that modules with weights of these shapes are too narrow for."""
    widest = max(max(shape[-2:]) for shape in shapes)
    if (most := max(map(settings.width_of, chosen))) > widest:
        twice = f", as wide as --init {settings.init} makes it," if settings.factored else ""
        what = f"{most}{twice} is more than the widest of these modules has features, {widest}"
        raise UserError(what, where="rank", hint="8 to 64 are usual")
    for module, shape in zip(chosen, shapes, strict=True):
        if settings.factored and settings.rank_of(module) > (narrow := min(shape[-2:])):
            what = f"--init {settings.init} finds {narrow} factors of {module}, and not {settings.rank_of(module)}"
            raise UserError(what, where="rank", hint="give a smaller --rank, or --rank-pattern for this module")


def check_patterns(settings: LoraSettings, chosen: list[str]) -> None:
    """Raise `UserError` for a rank or an alpha of a module that is not trained."""
    for where in ("rank_pattern", "alpha_pattern"):
        for key in getattr(settings, where):
            if not any(is_named(name, key) for name in chosen):
                hint = f"these are: {', '.join(sorted({name.rpartition('.')[2] for name in chosen}))}"
                raise UserError(f"no module that is trained is named {key}", where=where, hint=hint)


def in_words(settings: LoraSettings) -> str:
    """What a model card says of an adapter's shape, and of how it was trained."""
    stabilized = ", rank-stabilized" if settings.rslora else ""
    own = "; modules with ranks or alphas of their own" if settings.rank_pattern or settings.alpha_pattern else ""
    kinds = dict.fromkeys(map(in_a_layer, settings.targets))
    targets = ", ".join(f"`{target}`" for target in kinds)
    if len(kinds) < len(settings.targets):  # each module by its whole name
        targets += f" ({len(settings.targets)} modules)"
    names = ", ".join(f"`{name}`" for name in settings.also_train)
    also = f"; {names} trained in full" if names else ""
    rows = max(map(len, settings.token_rows.values()), default=0)
    also += f"; the rows of {many(rows, 'token')} in embeddings and head" if rows else ""
    layers = f" of the layers `{settings.layers}`" if settings.layers else ""
    return (
        f"rank {settings.rank}, alpha {settings.alpha:g}{stabilized}, on {targets}{layers}{own}{also}"
        f"{settings.starts_and_rates}"
    )


def adaptable(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """As `linear_modules`, with the embeddings of tokens, and the head that they are too where a model ties both."""
    found = {
        transformers_name(path): (path, module)
        for path, module in model.named_modules()
        if isinstance(module, EMBEDDING_KINDS) and is_embedding(path)
    }
    tied = tied_embedding(model)
    return found | linear_modules(model) | ({HEAD: found[tied]} if tied in found else {})


def adapted_modules(model: nn.Module, settings: LoraSettings) -> list[str]:
    """The names in transformers of the modules that get an adapter, in the model's order.

    `all-linear` is every linear module but the output head, as in PEFT, but the routers that choose experts, which are none there, and but
    those whose weights the checkpoint holds inside of other tensors.
    """
    in_full = {name for name, _, _ in whole_modules(model, settings.also_train)}
    linears = adaptable(model)
    names = in_layers(model, linears, settings.layers)
    return _chosen({name: linears[name] for name in names if name not in in_full}, settings.targets)


def _chosen(linears: Mapping[str, tuple[str, nn.Module]], targets: tuple[str, ...]) -> list[str]:
    names = list(linears)
    routed = {name.partition(EXPERTS_PART)[0] for name in names if EXPERTS_PART in name}
    routers = {f"{block}.{router}" for block in routed for router in ROUTERS}
    joined = {name for name, (_, module) in linears.items() if is_joined(module)}
    numbered = (name for name in names if any(part.isdigit() for part in name.split(".")))
    inner = [n for n in numbered if n not in joined and not any(f"{n}.".startswith(f"{router}.") for router in routers)]
    chosen: set[str] = set()
    for target in targets:
        if target in GROUPS:
            found = [n for n in inner if not GROUPS[target] or set(n.split(".")) & set(GROUPS[target])]
        else:
            named = [n for n in names if is_named(n, target)]
            found = [n for n in named if n not in joined] or named
        if not found:
            if joined.issuperset(name for name in names if not isinstance(linears[name][1], EMBEDDING_KINDS)):
                what = "this checkpoint holds the weights of all linear modules inside of other tensors, or under other names"
                raise UserError(what, where="target", hint="nothing could be merged into them; train another model")
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise UserError(
                f"no linear module of this model is named {target}",
                where="target",
                hint=f"it has {', '.join(known)}",
            )
        chosen.update(found)
    return [name for name in names if name in chosen]
