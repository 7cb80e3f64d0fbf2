"""`PGNModel`: PEFT's tuner. Injection, the names of tensors in a saved adapter, unloading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from pgn_peft.tuner.backbones import Backbone
from pgn_peft.tuner.checks import check_together
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.encoder_layer import PGNBlock
from pgn_peft.tuner.head import PGNHead
from pgn_peft.tuner.injection import Injection, plan_injection, refuse_other_adapters
from pgn_peft.tuner.layer import PGNLayer
from pgn_peft.tuner.mixed_batch import mixed_batch
from pgn_peft.tuner.readout import make_classifier, restore_model
from pgn_peft.tuner.subclassing import original_class
from pgn_peft.tuner.timm_positions import append_prompts
from pgn_peft.tuner.tuner_layer import NO_MERGE, PGNTunerLayer
from pgn_peft.utils.tensors import compare_tensors


class PGNConfigs(dict[str, PeftConfig]):
    """The adapters' configs by name. Refuses another method's, which PEFT enters here before it changes the model."""

    def __setitem__(self, adapter_name: str, config: PeftConfig) -> None:
        if not isinstance(config, PGNConfig):
            raise ValueError(
                f"A model with PGN adapters cannot take an adapter of another method, but got {type(config).__name__} "
                f"for {adapter_name!r}: its saved file would mix both. `unload()` the PGN adapters first."
            )
        super().__setitem__(adapter_name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add configs; see `__setitem__`."""
        for adapter_name, config in dict(*args, **kwargs).items():
            self[adapter_name] = config


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
    injections: Mapping[str, Injection] = MappingProxyType({})  # by adapter name

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        # Before PEFT enters the new config among the other adapters'.
        refuse_other_adapters(model)
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if not isinstance(self.peft_config, PGNConfigs):
            self.peft_config = PGNConfigs(self.peft_config)

    # Injection: all errors are raised before the model is changed.

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model; see `BaseTuner.inject_adapter` and `plan_injection`."""
        try:
            injection = plan_injection(model, cast(PGNConfig, self.peft_config[adapter_name]), adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        self.peft_config[adapter_name] = injection.config
        self.injections = {**self.injections, adapter_name: injection}
        if injection.adds_head:
            make_classifier(model)
        model.accepts_loss_kwargs = False  # type: ignore[assignment]  # Trainer then averages over accumulated batches
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        if injection.is_loaded:
            for layer in model.modules():
                if isinstance(layer, PGNTunerLayer):
                    layer.expect_tensors(adapter_name)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(  # type: ignore[override]  # PEFT's has no `self`
        self, peft_config: PeftConfig, key: str
    ) -> bool:
        injection = next(injection for injection in self.injections.values() if injection.config is peft_config)
        return key in injection.targets

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
        injection = self.injections[adapter_name]
        layer = self._wrap_embeddings(injection.backbone)
        if current_key == injection.head:
            if not isinstance(target, PGNHead):
                own_head = None if injection.adds_head else target
                target = PGNHead(own_head, getattr(self.model, "config", None), layer)
                setattr(parent, target_name, target)
            target.update_layer(adapter_name, injection.config)
            return
        if current_key == injection.backbone.embeddings:
            layer.update_layer(adapter_name, injection.config)
        elif not isinstance(target, PGNBlock):
            ends = injection.cuts_prompts_after(current_key)
            setattr(parent, target_name, PGNBlock(target, layer, int(target_name), ends))

    def _wrap_embeddings(self, backbone: Backbone) -> PGNLayer:
        """Wrap the embeddings, if they are not wrapped yet, and return the layer that makes the prompts."""
        above, _, name = backbone.embeddings.rpartition(".")
        parent = self.model.get_submodule(above)
        layer = getattr(parent, name)
        if not isinstance(layer, PGNLayer):
            layer = PGNLayer(layer, backbone.carries)
            layer.check_calls_of(parent if backbone.called is None else self.model.get_submodule(backbone.called))
            for part_name, part in parent.named_modules():
                extend = (backbone.positions or {}).get(part_name.rpartition(".")[2])
                if extend is not None:
                    layer.extend_positions(part, extend)
            setattr(parent, name, layer)
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
        for name in names:
            if name not in self.peft_config:
                raise ValueError(
                    f"`adapter_name` must be one of {', '.join(self.peft_config) or 'none'}, but got {name!r}. "
                    "Load it first: load_adapter(path, adapter_name)."
                )
        check_together(names, cast("dict[str, PGNConfig]", self.peft_config))
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, another one is activated, with its `modules_to_save`."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        self.injections = {name: injection for name, injection in self.injections.items() if name != adapter_name}
        if was_active and self.active_adapters:
            # Where the deleted adapter had none, PEFT would leave the base's modules in their place.
            self.set_adapter(self.active_adapters)

    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Any = None, **kwargs: Any
    ) -> AbstractContextManager[None]:
        # PEFT drops `adapter_names` silently for a tuner without this method.
        return nullcontext() if adapter_names is None else mixed_batch(self, adapter_names, args, kwargs)

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
            if child.carries:
                original_class(parent)
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
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # Any other tensor would be loaded over the frozen base. Names in a model that PEFT has not wrapped lack the
        # prefix; in the file they have it.
        found = {_without_wrapper(name): tensor for name, tensor in remapped.items()}
        expected = {_without_wrapper(name): tensor for name, tensor in _own_tensors(model, adapter_name)}
        compare_tensors(expected, found, "state_dict")
        return remapped


def _without_wrapper(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _own_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of everything that belongs to the adapter."""
    for layer_name, layer in model.named_modules():
        modules: dict[str, nn.Module] = {}
        if isinstance(layer, PGNTunerLayer):
            modules = layer.adapter_modules(adapter_name)
        elif isinstance(layer, ModulesToSaveWrapper) and adapter_name in layer.modules_to_save:
            modules = {"modules_to_save": layer.modules_to_save[adapter_name]}
        for container, module in modules.items():
            for name, tensor in module.state_dict().items():
                yield f"{layer_name}.{container}.{adapter_name}.{name}", tensor
