"""`PGNModel`: PEFT's tuner. Injection, use, the names of tensors in a saved adapter, unloading."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from pgn_peft.tuner.backbones import HEAD, Backbone, find_backbone, find_layers
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.head import PGNHead, find_head
from pgn_peft.tuner.headless import append_prompts, make_classifier, restore_class, restore_model
from pgn_peft.tuner.layer import PGNBlock, PGNLayer, check_together
from pgn_peft.tuner.mixed_batch import BASE, join_passes, running_batch, split_batch
from pgn_peft.tuner.prompts import describe_modules
from pgn_peft.tuner.resolve import refuse, resolve
from pgn_peft.tuner.tuner_layer import NO_MERGE, PGNTunerLayer

# Not used in inference, and changed in type and shape by tools that average or cast weights. Earlier files have it.
COUNTER = ".num_batches_tracked"


class PGNModel(BaseTuner):
    """A frozen Vision Transformer with Prompt Generation Network adapters.

    Made by `peft.get_peft_model(model, PGNConfig(...))` and everything else in PEFT that takes a config. Threads may
    run it side by side in eval mode, mixed batches included; adding, activating, disabling and deleting adapters
    changes the model for all of them, so no call may run at the same time.

    Args:
        model: a supported model, see `pgn_peft.tuner.backbones`.
        peft_config: the adapter's config.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: leave the new weights on the meta device, for loading.
        state_dict: a saved adapter's tensors, if its targets are to be inferred from their names.

    Raises:
        TypeError: the architecture is not supported.
        ValueError: the config does not fit the model, or the model carries adapters of another method.

    Source: arXiv:2210.06466.
    """

    prefix: str = "pgn_"
    tuner_layer_cls = PGNTunerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        # Before PEFT enters the new config among the other adapters'.
        others = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        if isinstance(model, PeftModel) or not all(isinstance(layer, PGNTunerLayer) for layer in others):
            raise ValueError(
                "The model carries adapters already. Use model.add_adapter(name, config) for a further PGN adapter; "
                "PGN and another method on one model are not supported, so unload() that first."
            )
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)

    # Injection. All errors are raised before the model is changed.

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model; see `BaseTuner.inject_adapter` and `resolve`."""
        config = cast(PGNConfig, self.peft_config[adapter_name])
        is_loaded = config.inference_mode and config.hidden_size is not None
        try:
            resolved = resolve(config, model)
            backbone = find_backbone(model, cast("list[str]", resolved.target_modules))
            _check_name(adapter_name, resolved)
            _check_modules_to_save(resolved, model, backbone)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        vars(config).update(vars(resolved))  # the object that the user passed, as PEFT does
        if backbone.head is None and config.num_labels is not None:
            make_classifier(model)
        model.accepts_loss_kwargs = False  # type: ignore[assignment]  # Trainer then averages over accumulated batches
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        if is_loaded:
            for layer in model.modules():
                if isinstance(layer, PGNTunerLayer):
                    layer.expect_tensors(adapter_name)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(  # type: ignore[override]  # PEFT's has no `self`
        self, peft_config: PeftConfig, key: str
    ) -> bool:
        return key in _targets(cast(PGNConfig, peft_config), self.model)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(PGNConfig, peft_config)
        backbone = find_backbone(self.model, cast("list[str]", config.target_modules))
        layer = self._wrap_embeddings(backbone)
        if current_key == backbone.embeddings:
            layer.update_layer(adapter_name, config)
        elif current_key == (backbone.head or HEAD):
            if not isinstance(target, PGNHead):
                if hasattr(self.model, "config"):  # whose labels change; another model may share it
                    self.model.config = copy.copy(self.model.config)
                own_head = None if backbone.head is None else target
                target = PGNHead(own_head, getattr(self.model, "config", None), layer)
                setattr(parent, target_name, target)
            target.update_layer(adapter_name, config)
        elif not isinstance(target, PGNBlock):
            is_last = current_key == find_layers(self.model, backbone.embeddings)[-1]
            setattr(parent, target_name, PGNBlock(target, layer, int(target_name), backbone.reads_all and is_last))

    def _wrap_embeddings(self, backbone: Backbone) -> PGNLayer:
        """Wrap the embeddings, if they are not wrapped yet, and return the layer that makes the prompts."""
        above, _, name = backbone.embeddings.rpartition(".")
        parent = self.model.get_submodule(above)
        layer = getattr(parent, name)
        if not isinstance(layer, PGNLayer):
            layer = PGNLayer(layer, backbone.carries)
            layer.check_calls_of(parent if backbone.called is None else self.model.get_submodule(backbone.called))
            layer.add_hook(self.model.register_forward_pre_hook(split_batch, with_kwargs=True))
            layer.add_hook(self.model.register_forward_hook(join_passes, with_kwargs=True))
            for part_name, part in parent.named_modules():
                extend = (backbone.positions or {}).get(part_name.rpartition(".")[2])
                if extend is not None:
                    layer.extend_positions(part, extend)
            setattr(parent, name, layer)
            # Trainer then averages the losses of accumulated batches, which those of regression and of several labels
            # per image need: they are means, and ignore the number of labels that Trainer would let them divide by.
            self.model.accepts_loss_kwargs = False
            if backbone.carries:
                append_prompts(parent)
        return layer

    # Using it.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several: their prompts are appended in this order, the first one's head is used.

        Raises:
            ValueError: no adapter has that name, or the adapters cannot be active together.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"No adapter is called {unknown[0]!r}. There are {', '.join(self.peft_config) or 'none'}."
            )
        check_together(names, cast("dict[str, PGNConfig]", self.peft_config))
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, another one is activated, with its `modules_to_save`."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.active_adapters:
            # Where the deleted adapter had none, PEFT would leave the base's modules in their place.
            self.set_adapter(self.active_adapters)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the weights of two generators cannot be averaged."""
        raise ValueError(
            "PGN adapters cannot be combined into one by weights. Activate several: "
            "model.base_model.set_adapter(['one', 'other'])."
        )

    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Any = None, **kwargs: Any
    ) -> AbstractContextManager[None]:
        # PEFT drops `adapter_names` silently for a tuner without this method.
        if adapter_names is None:
            return nullcontext()
        layer = next(module for module in self.model.modules() if isinstance(module, PGNLayer))
        head, configs = find_head(self.model), cast("Mapping[str, PGNConfig]", self.peft_config)
        images: Any = args[0] if args else kwargs.get("pixel_values")
        layer.check_inputs(self.model, (images,), {**kwargs, "pixel_values": None})
        unknown = [name for name in adapter_names if name != BASE and name not in configs]
        saved = [name for name, config in configs.items() if config.modules_to_save]
        several = not isinstance(adapter_names, str) and len(adapter_names) == len(images)
        refuse(
            [
                (
                    not several,
                    f"`adapter_names` is {adapter_names!r}, for {len(images)} images. Give a name for each.",
                ),
                (bool(unknown), f"`adapter_names` has {unknown[:1]}. There are {', '.join(configs)}, and {BASE!r}."),
                (self.training, "`adapter_names` is for inference: call model.eval() first."),
                (kwargs.get("labels") is not None, "`adapter_names` is for inference: pass no labels."),
                (
                    bool(saved),
                    f"`adapter_names` needs all modules, and those of {saved[:1]} (`modules_to_save`) are active.",
                ),
            ]
        )

        def fit_key(name: str) -> tuple[Any, ...]:
            """Images in one pass have equally many tokens and labels."""
            zero_shot = (
                None if head is None or name != BASE or not head.is_added else head.texts_of_base(adapter_names)
            )
            own = None if name == BASE else name
            labels = () if head is None else tuple(head.labels(zero_shot or own).id2label.items())
            return (*layer.count_prompts(name), labels, head is not None and head.is_added and not labels)

        return running_batch(adapter_names, fit_key)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self.model.modules():
            if isinstance(layer, PGNTunerLayer):
                layer.cast_adapter(adapter_name, upcast=autocast_adapter_dtype)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's method copies `.weight`, which embeddings do not have.
        if isinstance(child, PGNLayer):
            child.release()
            vars(self.model).pop("accepts_loss_kwargs", None)
            if child.carries:
                restore_class(parent)
        elif isinstance(child, PGNHead):
            child.show_base_labels()
            if child.is_added:
                restore_model(parent)
                return
        elif isinstance(child, ModulesToSaveWrapper):
            # PEFT would leave the trained copy in the base model.
            new_module = child.original_module
        setattr(parent, child_name, new_module)

    # The names of tensors in a saved adapter.

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        key = key.replace("_orig_mod.", "")  # put there by `torch.compile`
        # The base class looks for the name in the last two places only, and a generator's tensors lie deeper.
        for container in (*PGNLayer.adapter_layer_names, *PGNHead.adapter_layer_names):
            start, found, rest = key.rpartition(f".{container}.{adapter_name}.")
            if found:
                return f"{start}.{container}.{rest}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = {name: tensor for name, tensor in state_dict.items() if not name.endswith(COUNTER)}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT would load any other tensor over the frozen base's own. Names in a model that PEFT has not wrapped lack
        # the prefix; in the file they have it.
        found = {name.removeprefix("base_model.model."): tensor for name, tensor in remapped.items()}
        expected = {name.removeprefix("base_model.model.") for name in _own_tensors(model, adapter_name)}
        problems = [f"{name} is not part of it" for name in sorted(found.keys() - expected)]
        problems += [f"{name} is missing" for name in sorted(expected - found.keys())]
        problems += [
            f"{name} holds NaN or infinity"
            for name in sorted(found)
            if found[name].is_floating_point() and not bool(torch.isfinite(found[name]).all())
        ]
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(
                f"The weights of adapter {adapter_name!r} do not fit its configuration: {'; '.join(problems[:5])}"
                f"{more}. It was made for {config.base_model_name_or_path!r}; if that is this model, fetch it again."
            )
        return remapped


def _targets(config: PGNConfig, model: nn.Module) -> set[str]:
    """Name the modules that an adapter with a resolved config wraps."""
    backbone = find_backbone(model, cast("list[str]", config.target_modules))
    layers: list[str] = []
    if config.prompt_depth != 1 or backbone.reads_all:
        layers = find_layers(model, backbone.embeddings)
        layers = layers if config.prompt_depth != 1 else layers[-1:]  # after which the prompts are cut off
    head = {backbone.head} if backbone.head is not None else {HEAD} if config.num_labels is not None else set()
    return {backbone.embeddings, *head, *layers}


def _own_tensors(model: nn.Module, adapter_name: str) -> Iterator[str]:
    """Yield the names of all tensors that belong to an adapter."""
    for layer_name, layer in model.named_modules():
        modules: dict[str, nn.Module] = {}
        if isinstance(layer, PGNTunerLayer):
            modules = layer.adapter_modules(adapter_name)
        elif isinstance(layer, ModulesToSaveWrapper) and adapter_name in layer.modules_to_save:
            modules = {"modules_to_save": layer.modules_to_save[adapter_name]}
        for container, module in modules.items():
            for name in module.state_dict():
                yield f"{layer_name}.{container}.{adapter_name}.{name}"


def _check_name(adapter_name: str, config: PGNConfig) -> None:
    """Refuse the name of a part of the adapter: PEFT looks for adapters' names between the dots of tensor names.

    Raises:
        ValueError: the name is one of a part, or cannot be a key of a `ModuleDict`.
    """
    names = [f"{place}.{name}" for place, module in describe_modules(config).items() for name in module.state_dict()]
    places = [
        *cast("list[str]", config.target_modules),
        *(config.modules_to_save or []),
        "base_model.model.base_layer",
    ]
    parts = {part for name in (*names, *places, HEAD, BASE) for part in name.split(".")}
    if not adapter_name or "." in adapter_name or adapter_name in parts or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"An adapter cannot be called {adapter_name!r}: a part of the adapter or of torch's ModuleDict has that "
            "name, or it has a dot. Choose another name."
        )


def _check_modules_to_save(config: PGNConfig, model: nn.Module, backbone: Backbone) -> None:
    """Refuse `modules_to_save` that match no module, which PEFT would ignore, or that PGN wraps.

    Raises:
        ValueError: a name matches no module; or a module, also an earlier adapter's, overlaps with a wrapped one.
    """
    wrapped = _targets(config, model) | {
        name for name, part in model.named_modules() if isinstance(part, PGNTunerLayer)
    }
    for wanted in config.modules_to_save or ():
        matches = [name for name, _ in model.named_modules() if name.endswith(wanted)]  # as PEFT matches them
        if not matches:
            raise ValueError(f"`modules_to_save` names {wanted!r}, which is no module of the model.")
        clash = next((f"{name} and {layer}" for name in matches for layer in wrapped if _overlap(name, layer)), None)
        if clash is not None:
            raise ValueError(
                f"`modules_to_save` names {wanted!r}, which PGN wraps ({clash}). Leave that module frozen."
            )
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(_overlap(name, layer) for layer in wrapped):
            raise ValueError(
                f"An earlier adapter's `modules_to_save` has {name}, which this one would wrap. Delete it."
            )


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")
