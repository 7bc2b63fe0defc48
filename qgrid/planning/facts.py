"""What a plan needs to know beyond the configuration, each thing looked up once."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from qgrid import codec, device, environment, models, registry
from qgrid.calibration import calibration_identity
from qgrid.envs import builds, recipes
from qgrid.files import HashCache
from qgrid.lora import adapter_fit, adapters
from qgrid.measure import slices as slice_files
from qgrid.planning.estimate import Architecture
from qgrid.types import Calibration, Cell, DeviceKind, Gpu, Method, Model, Slices
from qgrid.weights import inspection, widths

T = TypeVar("T")


REMOTE = Gpu("remote", "cpu", "", None, 0.0, None, 1)  # where a server computes; nobody said what
WHERE_FOUND = ("gres", "constraint")  # of a `Gpu`: how a cluster finds it, not what it is
AUTO = Gpu("auto", "cpu", "", None, 0.0, None, 1)  # `conf/gpu/auto.yaml`


class FixedDevice(ValueError):
    """`gpu=auto` with keys of its own, which the description of this machine would replace."""


class Facts:
    """Identities of models, slices and calibration sets; this machine; locked versions."""

    def __init__(self, hashes: HashCache, elsewhere: bool = False) -> None:
        self._hashes = hashes
        self._elsewhere = elsewhere  # other machines will run the plan
        self._memo: dict[tuple[str, int], tuple[Any, Any]] = {}
        self._asked: dict[tuple[str, int, int, int, int], tuple[Cell, str | None]] = {}

    def digest(self, value: object) -> str:
        """`codec.digest`, once for each object."""
        return self._once("digest", value, codec.digest)

    def device(self, gpu: Gpu) -> str:
        """What the device contributes to a cell id: all but how a cluster finds one."""
        return self._once("device", gpu, _device)

    def model(self, model: Model) -> str:
        """What the content of checkpoint and adapter contributes to an artifact id."""
        return self._once("model", model, self._model)

    def _model(self, model: Model) -> str:
        return codec.digest(
            models.identity(model, self._hashes) | adapters.identity(model, self._hashes)
        )

    def adapter(self, model: Model) -> str | None:
        """Why the model cannot have its adapter, if it cannot."""
        return self._once("adapter", model, adapter_fit.refusal)

    def adapter_parameters(self, model: Model) -> int:
        """Numbers of the adapter that the model keeps beside its weights."""
        return self._once("adapter_parameters", model, adapters.num_parameters)

    def method(self, method: Method) -> str:
        """What a method contributes to an artifact id: its options, and the files they name."""
        return self._once("method", method, self._method)

    def _method(self, method: Method) -> str:
        identity = getattr(registry.method(method.name), "identity", None)
        if identity is None:
            return codec.digest(method)
        return codec.digest([method, identity(method.options, self._hashes)])

    def resolved(self, method: Method, bits: int) -> Method:
        """The method with the options that `bits` decides filled in, one object for each width.

        Options that say the same in several ways are settled to one.
        """
        fill = getattr(registry.method(method.name), "resolved", None)

        def filled(asked: Method) -> Method:
            options = asked.options if fill is None else fill(bits, asked.options)
            return widths.settled(replace(asked, options=options))

        return self._once(f"resolved:{bits}", method, filled)

    def calibration(self, calibration: Calibration) -> str:
        """What the calibration text contributes to an artifact id."""
        return self._once(
            "calibration",
            calibration,
            lambda c: codec.digest(calibration_identity(c, self._hashes)),
        )

    def slices(self, slices: Slices) -> str:
        """What the slices contribute to a quality id: their content and how they are scored."""
        return self._once("slices", slices, self._slices)

    def _slices(self, slices: Slices) -> str:
        scored = {name: replace(each, path="") for name, each in slices.items.items()}
        prose = None if slices.prose is None else replace(slices.prose, path="")
        return codec.digest([slice_files.identity(slices, self._hashes), scored, prose])

    def quantized(self, model: Model) -> str | None:
        """Why the model is no 16-bit base, where its `config.json` is on this machine."""
        return self._once("quantized", model, _quantized)

    def architecture(self, model: Model) -> Architecture | None:
        """The model's sizes where its `config.json` is on this machine, else None."""
        return self._once("architecture", model, _architecture)

    def gpu(self, gpu: Gpu, remote: bool = False) -> Gpu:
        """`gpu=auto` as this machine (`remote`: as an unknown one), any other as it is.

        Raises:
            FixedDevice: keys of `gpu=auto` were overridden, or other machines will run the plan.
        """
        if gpu.name != AUTO.name:
            return gpu
        if gpu != AUTO:
            raise FixedDevice(
                "`gpu=auto` is this machine as it is found, so `gpu.*` cannot be overridden; "
                "choose a device, such as `gpu=h100`, to change its keys"
            )
        if remote:
            return REMOTE
        if self._elsewhere:
            raise FixedDevice(
                "`gpu=auto` is the machine of this command, and other machines will run the cells; "
                "name what they have, such as `gpu=h100`, or your own file in `gpu/` of a "
                "`--config-dir`"
            )
        return self.machine

    @cached_property
    def machine(self) -> Gpu:
        """The device found here."""
        return device.describe()

    def objection(self, hook: str, cell: Cell) -> str | None:
        """What a hook of the cell's method says against its model here, asked once for each."""
        key = (hook, id(cell.model), id(cell.method), cell.bits, id(cell.gpu))
        if key not in self._asked:
            own = getattr(registry.method(cell.method.name), hook, None)
            self._asked[key] = (cell, None if own is None else own(cell))
        return self._asked[key][1]

    def _once(self, what: str, value: Any, compute: Callable[[Any], T]) -> T:
        key = (what, id(value))
        if key not in self._memo:
            self._memo[key] = (value, compute(value))  # the value is kept, so its id stays taken
        return self._memo[key][1]  # type: ignore[no-any-return]


def _device(gpu: Gpu) -> str:
    found = {name: value for name, value in codec.plain(gpu).items() if name not in WHERE_FOUND}
    return codec.digest(found)


def _quantized(model: Model) -> str | None:
    folder = models.known(model)
    return None if folder is None else inspection.already_quantized(folder, model.id)


def _architecture(model: Model) -> Architecture | None:
    folder = models.located(model)
    if folder is None:
        return None
    try:
        sizes = models.architecture(folder)
    except KeyError:  # a config that names its sizes otherwise, such as GPT-2's
        return None
    known = {field.name: sizes[field.name] for field in fields(Architecture)}
    return None if known["intermediate"] is None else Architecture(**known)


@cache
def locked(packages: tuple[str, ...], environment_name: str, kind: DeviceKind) -> str:
    """Identity of the locked versions of `packages`, the same on a login node and a GPU node."""
    versions = environment.locked_versions(environment_name, kind)
    return codec.digest(
        {name: versions.get(environment.normalized(name), "unlocked") for name in packages}
    )


@cache
def missing(
    packages: tuple[str, ...], environment_name: str = "main", kind: DeviceKind = "cpu"
) -> str | None:
    """One sentence naming what is not installed and the command that installs it, or None."""
    if environment_name != recipes.MAIN:
        return _missing_elsewhere(packages, environment_name, kind)
    absent = [name for name in packages if not _installed(name)]
    if not absent:
        return None
    pins = environment.locked_versions("main")
    wanted = [f"{name}=={pins[name]}" if name in pins else name for name in absent]
    return f"needs {', '.join(absent)}; run `pip install {shlex.join(wanted)}`"


@cache
def broken(
    known: tuple[tuple[str, str], ...], environment_name: str = "main", kind: DeviceKind = "cpu"
) -> str | None:
    """One sentence where an installed version is one of those known to corrupt, or None.

    `known` pairs requirements (`bitsandbytes==0.48.0`) with what these versions do.
    """
    from packaging.requirements import Requirement

    for requirement, why in known:
        asked = Requirement(requirement)
        found = environment.installed([asked.name], environment_name, kind)[asked.name]
        if found != environment.ABSENT and asked.specifier.contains(found, prereleases=True):
            pins = environment.locked_versions(environment_name, kind)
            pin = pins.get(environment.normalized(asked.name))
            advice = "install another version" if pin is None else f"install {asked.name}=={pin}"
            return f"does not use {asked.name} {found}, which {why}; {advice}"
    return None


def _missing_elsewhere(packages: tuple[str, ...], name: str, kind: DeviceKind) -> str | None:
    """The same of an environment that `setup` builds; what another machine has is not known."""
    try:
        recipe = recipes.recipe(name, kind)
    except environment.UnknownEnvironment as error:
        return str(error)
    pins = environment.locked_versions(name, kind)
    absent = [each for each in packages if environment.normalized(each) not in pins]
    if absent:
        return f"needs {', '.join(absent)}, which `{recipe.lock}` does not lock"
    if kind == device.describe().kind and builds.find(recipe) is None:
        return f"needs the environment `{name}`; run `{builds.command(recipe)}`"
    return None


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
