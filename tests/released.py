"""Sources of a release of vLLM, as `make vllm-sources` keeps them: what its modules define, without running any."""

import ast
from functools import cache, cached_property
from pathlib import Path
from zipfile import ZipFile

FOLDER = Path(__file__).parent.parent / "build" / "vllm-sources"


class Release:
    """Names are found where they are defined, through imports and aliases."""

    def __init__(self, version):
        self.path = FOLDER / f"{version}.zip"
        self.module, self.members = cache(self._module), cache(self._members)

    @cached_property
    def _archive(self):
        return ZipFile(self.path)

    @cached_property
    def _files(self):
        return set(self._archive.namelist())

    def _path_of(self, name):
        base = name.replace(".", "/")
        return next((path for path in (f"{base}.py", f"{base}/__init__.py") if path in self._files), None)

    def _module(self, name):
        """All top-level statements of a module, those under conditions too."""
        path = self._path_of(name)
        return None if path is None else [*_flattened(ast.parse(self._archive.read(path)).body)]

    def find(self, module, name):
        """The module and the statement that define a name; None if nothing does."""
        for statement in self.module(module) or ():
            if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == name:
                return module, statement
            if isinstance(statement, ast.AnnAssign | ast.Assign) and name in _targets(statement):
                alias = isinstance(statement.value, ast.Name) and self.find(module, statement.value.id)
                return alias or (module, statement)
            if isinstance(statement, ast.ImportFrom):
                found = self._imported(module, statement, name)
                if found is not None:
                    return found
        return None

    def _imported(self, module, statement, name):
        named = {alias.asname or alias.name: alias.name for alias in statement.names}
        if name not in named:
            return None
        base = statement.module or ""
        if statement.level:
            package = module.split(".")
            is_package = self._path_of(module).endswith("__init__.py")
            above = package[: len(package) - statement.level + is_package]
            base = ".".join([*above, *([base] if base else [])])
        return self.find(base, named[name])

    def classes(self, module, name):
        """A class and those it derives from, as far as they are vLLM's."""
        found = self.find(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return
        yield found[1]
        for base in found[1].bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                yield from self.classes(found[0], base.id)

    def _members(self, module, name):
        """Methods, fields and enum members of a class, and what its methods set of ``self``: statements by name."""
        found = {}
        for owner in reversed([*self.classes(module, name)]):
            for node in ast.walk(owner):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                    found.setdefault(node.attr, node)
            for statement in owner.body:
                if isinstance(statement, ast.FunctionDef):
                    found[statement.name] = statement
                elif isinstance(statement, ast.AnnAssign | ast.Assign):
                    found |= dict.fromkeys(_targets(statement), statement)
        return found


def parameters(function):
    """Of a function, or of a method behind ``self`` or ``cls``."""
    named = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
    return named[1:] if named[:1] in (["self"], ["cls"]) else named


def is_marked(function, decorator):
    return any(ast.unparse(one).split(".")[-1] == decorator for one in function.decorator_list)


def _flattened(statements):
    for statement in statements:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _flattened([*statement.body, *statement.orelse])
            yield from _flattened([inner for one in getattr(statement, "handlers", ()) for inner in one.body])


def _targets(statement):
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"
