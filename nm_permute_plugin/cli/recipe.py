# SPDX-License-Identifier: Apache-2.0
"""``nm-permute recipe``: write a recipe, show all its settings, check it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.logs import HostLog

recipe = typer.Typer(
    no_args_is_help=True, help="Write a recipe, show all its settings, check it."
)

File = Annotated[Path, Argument(metavar="FILE", help="YAML recipe.")]

OURS = "LearnablePermutationModifier"
QUANTIZED: dict[str, str] = {
    "fp8": "FP8_DYNAMIC",
    "fp8-static": "FP8",
    "w8a8": "W8A8",
    "w4a16": "W4A16",
}
"""What ``--then`` calls the schemes of llm-compressor's quantization."""

COMPENSATED = ("fp8", "fp8-static", "w4a16")
"""Those whose weights GPTQ rounds, which loses less; INT8 loses by its activations. A
recovery learns under rounding to the nearest instead."""

PRUNERS = {"sparsegpt": "SparseGPTModifier", "wanda": "WandaPruningModifier"}
"""What it calls llm-compressor's own pruning, for which the permutation is folded only."""

SMOOTHED = "smoothquant"
THEN = (*QUANTIZED, SMOOTHED, *PRUNERS)

COMMENTS = {
    "mask_structure": "N:M: N weights are kept of M neighbours; in quotes, or YAML "
    "reads a number",
    "score": "what a weight is worth: wanda, ria, or magnitude (without activations)",
    "method": "learned; search (nothing is learned); identity (the plain score)",
    "batch_size": "rows of text, or images, of a step",
    "prune": "the permutation is folded only, and the modifier below prunes",
    "learn": "permutations alone: the mask is another modifier's",
    "recover": "what the mask keeps changes: rescale, blocks, end_to_end, in this order",
    "ignore": "linears that stay dense: names, classes, or patterns after re:",
    "scheme": "FP8_DYNAMIC, FP8, W8A8 and W4A16 keep the zeros",
}
"""What stands behind a field in a recipe that ``new`` writes."""


def _naming_the_file(command: Callable[..., None]) -> Callable[..., None]:
    """Let the error of a command about a recipe name the recipe's file."""

    @wraps(command)
    def named(*, file: Path, **options: Any) -> None:
        try:
            command(file=file, **options)
        except ValueError as error:
            if str(file) in str(error):
                raise
            raise ValueError(f"recipe {file}: {error}") from error

    return named


@recipe.command()
def new(
    method: Annotated[str, Option(help="learned, search or identity.")] = "learned",
    pattern: Annotated[str, Option(help="N:M, such as 2:4 or 4:8.")] = "2:4",
    score: Annotated[str, Option(help="wanda, ria or magnitude.")] = "wanda",
    recover: Annotated[
        list[str] | None,
        Option(help="rescale, blocks or end_to_end; repeatable, in their order."),
    ] = None,
    then: Annotated[
        list[str] | None,
        Option(help=f"What follows: {', '.join(THEN)}; repeatable, in their order."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        Option(help="A linear that stays dense; repeatable (lm_head)."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field, such as learn.steps=20, search.rounds=4 or "
            "batch_size=1 (`nm-permute fields` lists them); repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None, Option(help="The file to write; stdout if left out.")
    ] = None,
) -> None:
    """Print a commented recipe, or write it to a file."""
    fields: dict[str, Any] = {
        "mask_structure": pattern,
        "score": score,
        "method": method,
        **({"recover": list(recover)} if recover else {}),
        "ignore": list(ignore or ["lm_head"]),
    }
    text = written(_with_fields(fields, set_ or []), then or [])
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise FileExistsError(f"{out} exists; name a new file")
    out.write_text(text, encoding="utf-8")
    typer.echo(f"{out}: next: nm-permute recipe check {out} --model MODEL")


@recipe.command()
def show(file: File) -> None:
    """Print a recipe with all settings, the defaults too, and mark what differs."""
    from nm_permute_plugin._files import read_yaml
    from nm_permute_plugin.pruning.describe import changed_settings
    from nm_permute_plugin.pruning.settings import Settings

    ours = _ours_of(file)[0]
    settings = ours.settings()
    every = settings.model_dump(mode="json", include=set(Settings.model_fields))
    marks = dict.fromkeys(changed_settings(settings), "")
    defaults = Settings().model_dump(mode="json")
    for path in marks:
        value: Any = defaults
        for name in path.split("."):
            value = value[name]
        marks[path] = f"the default is {_flow(value)}"
    _, document = read_yaml(file, "recipe")
    typer.echo("\n".join(_lines(document, every, marks)))


@recipe.command()
@_naming_the_file
def check(
    file: File,
    model: Annotated[
        str | None,
        Option(help="Folder of the dense model, or its name on the hub; not loaded."),
    ] = None,
) -> None:
    """Check for all that is certain to fail, without running anything."""
    ours, modifiers = _ours_of(file)
    from llmcompressor.modeling.moe.linearize import get_non_linearized_moes

    from nm_permute_plugin.evaluation.model_names import must_be_model
    from nm_permute_plugin.evaluation.pretrained import empty_model
    from nm_permute_plugin.modifiers.preflight import Look
    from nm_permute_plugin.pruning.describe import changed_settings, describe
    from nm_permute_plugin.pruning.targets import match_linears, refuse_tied
    from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
    from nm_permute_plugin.specs.spec import resolve

    settings = ours.settings()
    if model is None:
        Look(ours, modifiers).refuse()
        changed = ", ".join(changed_settings(settings)) or "none"
        said = [f"settings that are not the defaults: {changed}"]
    else:
        must_be_model(model)
        empty: Any = empty_model(model)
        packed = bool(get_non_linearized_moes(empty))
        Look(ours, modifiers, None if packed else empty).refuse()
        said = ["its experts are unpacked by a run, and were not looked at"]
        if not packed:
            prunable = match_linears(empty, settings.targets, settings.ignore)
            refuse_tied(empty, prunable)
            spec = settings.spec if settings.spec is not None else spec_of(empty)
            head_dim = head_dim_of(empty.config)
            known = (settings.pattern, prunable, head_dim)
            resolved = resolve(empty, spec, *known, with_values=False)
            said = describe(empty, prunable, settings)
            if settings.method != "identity":
                said += resolved.listing(settings.spaces)
    names = ", ".join(type(each).__name__ for each in modifiers)
    typer.echo("\n".join([f"{file}: good ({names})", *said]))


def written(fields: Mapping[str, Any], then: list[str]) -> str:
    """
    Write a recipe with comments.

    :param fields: of our modifier
    :param then: what follows, of ``THEN``
    :raises ValueError: for a name that there is not, and for settings that do not fit
    """
    from pydantic import ValidationError

    from nm_permute_plugin._near_names import did_you_mean
    from nm_permute_plugin.pruning.settings import Settings
    from nm_permute_plugin.pruning.settings.errors import one_line

    for name in then:
        if name not in THEN:
            near = did_you_mean(name, THEN) or f"; there are {', '.join(THEN)}"
            raise ValueError(f"--then {name}: there is no such step{near}")
    pruners = [name for name in then if name in PRUNERS]
    if len(pruners) > 1:
        raise ValueError(
            f"--then {' and '.join(pruners)}: one of them prunes; take one"
        )
    body = dict(fields)
    if pruners:
        last = body.pop("ignore")
        body["prune"] = False
        if body["method"] == "learned":
            body["learn"] = {"stages": ["swaps"], **body.get("learn", {})}
        body["ignore"] = last
    try:
        settings = Settings.model_validate(body)
    except ValidationError as error:
        raise ValueError(f"no such recipe: {one_line(error)}") from error
    groups: dict[str, dict[str, Any]] = {"permutation_modifiers": {OURS: body}}
    for name in then:
        group, kind, values = _following(name, settings.pattern.density, body)
        if group in groups:
            (there,) = groups[group]
            raise ValueError(f"--then {name}: there is a {there} already; take one")
        groups[group] = {kind: values}
    what = f"{body['mask_structure']} by {body['score']}, method {body['method']}"
    lines = [
        f"# {what}{''.join(f', then {name}' for name in then)}.",
        "#   nm-permute recipe check FILE --model MODEL     finds what must fail",
        "#   nm-permute prune MODEL FILE OUT --text TEXT.txt --dry-run",
        "# All other fields, with their defaults: nm-permute fields",
        "prune_stage:",
    ]
    for group, kinds in groups.items():
        lines.append(f"  {group}:")
        for kind, values in kinds.items():
            lines.append(f"    {kind}:")
            for name, value in values.items():
                known = kind == OURS or name == "scheme"
                known &= name != "learn" or bool(pruners)
                comment = COMMENTS.get(name) if known else None
                end = f"  # {comment}" if comment else ""
                lines.append(f"      {name}: {_flow(value)}{end}")
    return "\n".join(lines) + "\n"


def _with_fields(fields: Mapping[str, Any], given: list[str]) -> dict[str, Any]:
    """
    Put fields of ``--set`` into those of our modifier, ``ignore`` at the end as ever.

    :raises ValueError: for words that name no field and value
    """
    import yaml

    body = dict(fields)
    ignore = body.pop("ignore")
    for word in given:
        path, equals, text = word.partition("=")
        if not path or not equals:
            raise ValueError(f"--set {word}: give FIELD=VALUE, such as learn.steps=20")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {word}: {text!r} is no YAML") from error
        *groups, name = path.split(".")
        node = body
        for group in groups:
            inner = node.get(group, {})
            # A list of stages stands for their group.
            inner = {"stages": inner} if isinstance(inner, list) else inner
            if not isinstance(inner, dict):
                raise ValueError(f"--set {word}: {group} is {inner!r}, and no group")
            node[group] = inner
            node = inner
        node[name] = value
    body["ignore"] = body.pop("ignore", ignore)
    return body


def _following(
    name: str, density: float, body: Mapping[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    """Return a step's group, its modifier and the fields of that."""
    if name == SMOOTHED:
        values = {"smoothing_strength": 0.5, "ignore": body["ignore"]}
        return "smoothing_modifiers", "SmoothQuantModifier", values
    if name in PRUNERS:
        # A plain name does not match there, and nothing says so.
        ignore = [e if e.startswith("re:") else f"re:.*{e}" for e in body["ignore"]]
        values = {"sparsity": 1 - density, "mask_structure": body["mask_structure"]}
        values |= {"targets": ["Linear"], "ignore": ignore}
        return "sparsity_modifiers", PRUNERS[name], values
    values = {"scheme": QUANTIZED[name], "targets": ["Linear"]}
    values |= {"ignore": body["ignore"]}
    compensated = name in COMPENSATED and not body.get("recover")
    kind = "GPTQModifier" if compensated else "QuantizationModifier"
    return "quantization_modifiers", kind, values


def _ours_of(file: Path) -> tuple[Any, list[Any]]:
    """
    Our modifier of a recipe, and all of them.

    :raises ValueError: for a recipe that llm-compressor would not read completely
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    # From its import on, llm-compressor logs to what is stdout then.
    with redirect_stdout(cast("Any", HostLog())):
        from llmcompressor.recipe import Recipe

        from nm_permute_plugin.modifiers.fields import PermutationFields
        from nm_permute_plugin.modifiers.recipe import read_recipe

        modifiers = list(Recipe.create_instance(read_recipe(file)).modifiers)
    ours = next(each for each in modifiers if isinstance(each, PermutationFields))
    return ours, modifiers


def _lines(
    node: Any, ours: Mapping[str, Any], marks: Mapping[str, str], indent: str = ""
) -> Iterator[str]:
    """Yield the lines of a recipe with all settings of our modifier."""
    for name, value in node.items():
        if name == OURS:
            yield f"{indent}{name}:"
            yield from _settings(ours, marks, f"{indent}  ")
        elif isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, ours, marks, f"{indent}  ")
        else:
            yield f"{indent}{name}: {_flow(value)}"


def _settings(
    node: Mapping[str, Any], marks: Mapping[str, str], indent: str, prefix: str = ""
) -> Iterator[str]:
    for name, value in node.items():
        mark = marks.get(f"{prefix}{name}")
        if isinstance(value, Mapping) and value and mark is None:
            yield f"{indent}{name}:"
            yield from _settings(value, marks, f"{indent}  ", f"{prefix}{name}.")
        else:
            end = f"  # {mark}" if mark is not None else ""
            yield f"{indent}{name}: {_flow(value)}{end}"


def _flow(value: Any) -> str:
    """Write a value as YAML on one line."""
    import yaml

    class Quoting(yaml.SafeDumper):
        """Texts that YAML 1.1 would read as numbers stand in double quotes."""

    def text(dumper: Any, value: str) -> Any:
        plain = value.replace("_", "a").isalnum() and not value[:1].isdigit()
        style = None if plain else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Quoting.add_representer(str, text)
    # In a list, so that YAML puts no mark of a document's end behind a word.
    dump = partial(yaml.dump, Dumper=Quoting, default_flow_style=True, width=10**6)
    return str(dump([value], sort_keys=False)).strip()[1:-1]
