#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Find in installed packages what the numpy beside them has removed, and make a patch of what can be mended.

Usage:
    python scripts/scan_packages.py gym fasttext-wheel --python .venv/bin/python
    python scripts/scan_packages.py gym --write patches
    python scripts/scan_packages.py ./some-folder --json

Reads   PACKAGE…: distributions or modules of the environment, or paths (./folder, ./file.py); without any, all that is
        installed there. The syntax tree is read, never the text, and the environment's own numpy is asked what it lacks:
          numpy.NAME         a name that it has not, under whatever import, alias or getattr
          array(copy=False)  since numpy 2 "never copy", an error for a list, where it was "copy only if needed"
          numpy 1 ABI        a compiled module that numpy 2 cannot load: no patch can help, another version must be pinned
        `certain` is what fails when it is run; what is guarded by a check or a try, shadowed, set by the package itself, not
        evaluated, or of unknown type is `possible`.
Writes  On stdout a line, or with --json an object, for each. --write FILE.patch, or DIR/PACKAGE/NNNN-numpy-names.patch with
        its line in DIR/series: the certain uses that have an exact equivalent, in the format of patch_packages.py. Strings
        and comments stay as they are.
Exit    0 done, whatever was found; 1 the environment or a file cannot be read; 2 usage; 3 refused, another patch is there.
Needs   The standard library alone, and numpy in that environment, which may be one of Python 3.8 or newer; no network.

np.float was another name of the builtin float, so that takes its place. np.float64 (--np-float float64) is the same as a
dtype, but as a key it is another one, and isinstance(1.0, np.float64) is false. np.bool and np.long are back in numpy 2, as
scalar types: there they are not found.
"""

import argparse
import ast
import builtins
import collections
import contextlib
import difflib
import hashlib
import io
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

# The release that removed a name, and what has its meaning where there is such a thing: np.NAME, a builtin, or an expression.
# `@` is the release that brought the new name. For a name without `=`, or not here, numpy's own words are shown.
REMOVED = """
1.24 bool=bool complex=complex float=float int=int long=int object=object str=str unicode=str typeDict=np.sctypeDict
2.0 Inf=np.inf Infinity=np.inf NAN=np.nan NINF=(-np.inf) NZERO=(-0.0) NaN=np.nan PINF=np.inf PZERO=0.0 infty=np.inf
2.0 bool8=np.bool_ bytes0=np.bytes_ cfloat=np.complex128 clongfloat=np.clongdouble complex_=np.complex128 float_=np.float64
2.0 int0=np.intp longcomplex=np.clongdouble longfloat=np.longdouble object0=np.object_ singlecomplex=np.complex64
2.0 str0=np.str_ string_=np.bytes_ uint0=np.uintp unicode_=np.str_ void0=np.void
2.0 alltrue=np.all cumproduct=np.cumprod mat=np.asmatrix product=np.prod round_=np.round sometrue=np.any
2.0 byte_bounds=np.lib.array_utils.byte_bounds@2.0 compare_chararrays=np.char.compare_chararrays format_parser=np.rec.format_parser
2.0 AxisError=np.exceptions.AxisError@1.25 ComplexWarning=np.exceptions.ComplexWarning@1.25
2.0 RankWarning=np.exceptions.RankWarning@2.0 TooHardError=np.exceptions.TooHardError@1.25
2.0 VisibleDeprecationWarning=np.exceptions.VisibleDeprecationWarning@1.25 DataSource=np.lib.npyio.DataSource
2.0 add_docstring=np.lib.add_docstring add_newdoc=np.lib.add_newdoc tracemalloc_domain=np.lib.tracemalloc_domain
2.0 array(copy=False)=np.asarray()@2.0 add_newdoc_ufunc asfarray cast compat deprecate deprecate_with_doc disp fastCopyAndTranspose
2.0 find_common_type get_array_wrap geterrobj issctype issubclass_ issubsctype lookfor math maximum_sctype msort nbytes obj2sctype
2.0 recfromcsv recfromtxt safe_eval sctype2char sctypes set_numeric_ops set_string_function seterrobj source who
2.4 in1d=np.isin().ravel() trapz=np.trapezoid@2.0
2.5 chararray=np.char.chararray row_stack=np.vstack
"""
METHODS = {"itemset": "a[…] = …", "newbyteorder": "a.view(a.dtype.newbyteorder(…))", "ptp": "np.ptp(a, …)", "tostring": "a.tobytes()"}
CHECKS = re.compile(r"(?<!con)(?<!in)version|(?:^|_)(?:numpy|np)[a-z_]*\d|^type_checking$|^py_?[23]|compat(?!ib)", re.I)
TARGETS = (ast.Name, ast.Tuple, ast.List, ast.Starred)
MISSING = {"AttributeError", "ImportError", "ModuleNotFoundError", "NameError"}
CATCHERS = MISSING | {"ValueError", "Exception", "BaseException"}
DISTRIBUTIONS = r"""
import importlib.metadata as metadata, json, re, sys
asked, found = json.load(sys.stdin), {}
for dist in metadata.distributions():
    files = [str(f) for f in dist.files or () if ".." not in f.parts]
    about = {"name": dist.metadata["Name"] or "", "version": dist.version, "root": str(dist.locate_file("")), "files": files}
    tops = {re.sub(r"(/|\.py$).*", "", f) for f in files}
    for name in asked or [about["name"]]:
        exact = re.sub("[-_.]+", "-", name).lower() == re.sub("[-_.]+", "-", about["name"]).lower()
        if exact and not found.get(name, {}).get("exact") or name in tops and name not in found:
            found[name] = dict(about, exact=exact)
print(json.dumps(found))
"""
NUMPY = r"""
import contextlib, importlib, io, json, sys, warnings
from types import ModuleType
warnings.simplefilter("ignore")
import numpy

def missing(path):
    value, parts = numpy, path.split(".")
    for count, part in enumerate(parts[1:], 2):
        if not isinstance(value, (ModuleType, type)) or part in ("__main__", "conftest"):
            return None
        try:
            # what numpy removed from arrays stays in their class, and raises when an array is asked
            value = getattr(numpy.zeros(1) if value is numpy.ndarray and part[0] != "_" else value, part)
        except AttributeError as error:
            name = ".".join(parts[:count])
            try:
                value = importlib.import_module(name)
            except ModuleNotFoundError as unfound:
                if unfound.name == name or not isinstance(value, ModuleType):
                    return [count, str(error).splitlines()[0]]
                return None
    return None

answers = {}
with contextlib.redirect_stdout(io.StringIO()):
    for path in json.load(sys.stdin):
        try:
            answers[path] = missing(path)
        except BaseException:
            answers[path] = None
print(json.dumps({"version": numpy.__version__, "missing": {path: answer for path, answer in answers.items() if answer}}))
"""


# >>> snippet: write_atomic
@contextlib.contextmanager
def write_atomic(path, mode="wb"):
    """Yield a file that takes the place of `path`, fsynced, when the block ends well; else `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# <<<


@dataclass
class Use:
    """A dotted numpy path that code uses. `nodes[i]`: the expression, or import, that stands for its first `first + i` names.
    `kind`: attribute, import, getattr, method, copy, text (in an f-string); `doubt`: why it may not fail; `call`: the call
    that it is the function of; `shadowed`: builtins that have another meaning there."""

    path: str
    nodes: list
    first: int
    kind: str = "attribute"
    doubt: str = ""
    call: ast.Call = None
    shadowed: frozenset = frozenset()


@dataclass
class Finding:
    """What is reported of one place; `doubt`: why it may be none; `edits`: [(start, end, new text)] of the file's UTF-8 that mend it."""

    file: str
    line: int
    symbol: str
    note: str
    doubt: str = ""
    edits: list = field(default_factory=list)

    @property
    def level(self):
        return "possible" if self.doubt else "certain"


@dataclass
class Package:
    """What is scanned: an installed distribution, or (version "") a path; `files` relative to `root`, `shown` before them in reports."""

    name: str
    version: str
    root: Path
    files: list
    shown: str = ""


def removed_names(np_float):
    """Return {name: (release that removed it, its equivalent or "", release since which that exists or "")} of REMOVED."""
    table = {}
    for line in REMOVED.split("\n"):
        for word in line.split()[1:]:
            old, _, since = word.partition("@")
            name, _, new = old.rpartition("=") if "=" in old else (old, "", "")
            table[name] = (line.split()[0], "np.float64" if name == "float" and np_float == "float64" else new, since)
    return table


def walk(statements):
    """Yield all nodes of statements."""
    for statement in statements:
        yield from ast.walk(statement)


def bindings(statements):
    """Return ({name: paths} that statements bind in their own scope, the same of names declared global); a path is the dotted
    name of what is imported, None anything else. A None beside an
    import, assigned for want of the module, does not count."""
    found, declared, nothing, todo = collections.defaultdict(set), set(), set(), list(reversed(statements))
    while todo:
        node = todo.pop()
        match node:
            case ast.Import(names=names):
                for alias in names:
                    top = alias.name.partition(".")[0]
                    found[alias.asname or top].add(alias.name if alias.asname else top)
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    found[alias.asname or alias.name].add(f"{'.' * level}{module or ''}.{alias.name}")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found[name].add(None)
                continue
            case ast.Assign(targets=targets, value=ast.Constant(value=None)):
                nothing |= {target.id for target in targets if isinstance(target, ast.Name)}
                continue
            case ast.Global(names=names):
                declared |= set(names)
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
                found[name].add(None)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                found[name].add(None)
        # of expressions only targets bind: to look for a := in all others would double the time
        todo += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr) or isinstance(n, TARGETS)]
    found |= {name: {None} for name in nothing - found.keys()}
    return {n: p for n, p in found.items() if n not in declared}, {n: p for n, p in found.items() if n in declared}


def sequences(function):
    """Return the names to which a function gives nothing but lists, tuples and what zip() unpacks to: never an array."""

    def is_sequence(value):
        made = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in ("list", "tuple", "sorted", "zip")
        return made or isinstance(value, ast.List | ast.Tuple | ast.ListComp)

    stored, given = collections.Counter(), collections.Counter()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored[node.id] += 1
        elif isinstance(node, ast.arg):
            stored[node.arg] += 1
        elif isinstance(node, ast.Assign) and is_sequence(node.value):
            for target in node.targets:
                names, values = [target], [node.value]
                if isinstance(target, ast.Tuple):
                    names = target.elts
                    values = node.value.elts if isinstance(node.value, ast.Tuple) else names if isinstance(node.value, ast.Call) else []
                for name, value in zip(names, values, strict=False):
                    given[getattr(name, "id", "")] += value is name or is_sequence(value)
    return {name for name, count in stored.items() if given[name] == count}


class Reader(ast.NodeVisitor):
    """Collects a module's uses of numpy: `uses`, and `given`, the numpy names that it sets itself."""

    def __init__(self, tree, has_global=True):
        self.uses, self.given, self.guards, self.calls, self.text, self.function = [], set(), [], {}, None, tree
        futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        self.lazy = "annotations" in {alias.name for node in futures for alias in node.names}
        top = bindings(tree.body)[0]
        for node in ast.walk(tree) if has_global else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for name, paths in bindings(node.body)[1].items():
                    top.setdefault(name, set()).update(paths)
        self.scopes = [(top, "module")]
        self.block(tree.body)
        self.calls, self.function = {}, None  # else the whole tree stays in memory

    def resolve(self, name):
        """Return what a name is bound to here, as bindings() tells; None when nothing in the module binds it."""
        for depth, (names, kind) in enumerate(reversed(self.scopes)):
            if name in names and (kind != "class" or not depth):
                return names[name]
        return None

    def path(self, node):
        """Return (dotted path, expressions, names that the first of them stands for, doubt) as in Use; None if not imported."""
        nodes = [node]
        while isinstance(node, ast.Attribute):
            node = node.value
            nodes.insert(0, node)
        if not isinstance(node, ast.Name):
            return None
        bound = self.resolve(node.id)
        doubt = "also bound to something else" if bound and len(bound) > 1 else ""
        if bound is None and not hasattr(builtins, node.id) and "numpy.*" in self.scopes[0][0].get("*", ()):
            bound, doubt = {f"numpy.{node.id}"}, "by import *"
        bound = sorted((p for p in bound or () if p), key=lambda p: (p.partition(".")[0] != "numpy", p))
        if not bound:
            return None
        return ".".join([bound[0], *(n.attr for n in nodes[1:])]), nodes, bound[0].count(".") + 1, doubt

    def numpy(self, node):
        """Return what path() does, for paths that begin at numpy; else None."""
        found = self.path(node)
        return found if found and found[0].partition(".")[0] == "numpy" else None

    def use(self, path, nodes, first, error, kind="attribute", doubt="", call=None):
        """Note a use of a numpy path, with the reason for which it may not raise `error`."""
        catching = {error, error.replace("Import", "ModuleNotFound"), "Exception", "BaseException"}
        caught = next((why for why, names in self.guards if names is None or names & catching), "")
        if self.text:
            nodes, kind = [self.text] * len(nodes), "text"
        shadowed = frozenset(n for n in ("bool", "complex", "float", "int", "object", "str") if self.resolve(n))
        self.uses.append(Use(path, nodes, first, kind, caught or doubt, call, shadowed))

    def scope(self, names, kind, visit):
        self.scopes.append((names, kind))
        guards, self.guards = self.guards, [g for g in self.guards if g[1] is None] if kind == "function" else self.guards
        visit()
        self.scopes.pop()
        self.guards = guards

    def visit_FunctionDef(self, node):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *filter(None, [arguments.vararg, arguments.kwarg])]
        decorators = getattr(node, "decorator_list", [])
        for child in (*decorators, *arguments.defaults, *filter(None, arguments.kw_defaults)):
            self.visit(child)
        for annotation in filter(None, [*(a.annotation for a in every), getattr(node, "returns", None)]):
            self.guarded([("an annotation that is not evaluated", None)] if self.lazy else [], lambda a=annotation: self.visit(a))
        body = node.body if isinstance(node.body, list) else [node.body]
        names, outer, self.function = bindings([*every, *body])[0], self.function, node
        check = [("under a check of versions", None)] if any(map(self.checks, decorators)) else []
        self.guarded(check, lambda: self.scope(names, "function", lambda: self.block(body)))
        self.function = outer

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_ClassDef(self, node):
        for child in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(child)
        self.scope(bindings(node.body)[0], "class", lambda: self.block(node.body))

    def visit_ListComp(self, node):
        self.scope(bindings([g.target for g in node.generators])[0], "comprehension", lambda: self.generic_visit(node))

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def guarded(self, guards, visit):
        """Visit under more guards: (why, names of the exceptions that are caught; None: any)."""
        self.guards = [*self.guards, *guards]
        visit()
        self.guards = self.guards[: len(self.guards) - len(guards)]

    def checks(self, test):
        """Tell whether an expression asks for a version, or for what numpy has."""
        for node in ast.walk(test):
            match node:
                case ast.Call(func=ast.Name(id="hasattr" | "getattr" | "dir" | "vars"), args=[about, *_]):
                    if self.numpy(about):
                        return True
                case ast.Name(id=name) | ast.Attribute(attr=name) if CHECKS.search(name):
                    return True
        return False

    def block(self, statements):
        """Visit statements; those behind an `if VERSION: … return` are under its check."""
        before = self.guards
        for statement in statements:
            self.visit(statement)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break):
                self.guards = [*self.guards, ("under a check of versions", None)] if self.checks(statement.test) else self.guards
        self.guards = before

    def visit_If(self, node):
        self.visit(node.test)
        check = [("under a check of versions", None)] if self.checks(node.test) else []
        for part in (node.body, node.orelse):
            self.guarded(check, lambda part=part: self.block(part) if isinstance(part, list) else self.visit(part))

    visit_IfExp = visit_If

    def visit_BoolOp(self, node):
        for number, value in enumerate(node.values):
            check = [("under a check of versions", None)] if any(map(self.checks, node.values[:number])) else []
            self.guarded(check, lambda value=value: self.visit(value))

    def visit_Try(self, node):
        caught = [{n.id for n in ast.walk(h.type) if isinstance(n, ast.Name)} if h.type else {"Exception"} for h in node.handlers]
        about = any(isinstance(n, ast.Import | ast.ImportFrom) or self.numpy(n) for n in walk(node.body))
        self.guarded([("in a try that catches it", names) for names in caught], lambda: self.block(node.body))
        for handler, names in zip(node.handlers, caught, strict=True):
            guard = [("in place of what is missing", None)] if names & MISSING or (names & CATCHERS and about) else []
            self.guarded(guard, lambda h=handler: self.block(h.body))
        self.block(node.orelse)
        self.block(node.finalbody)

    visit_TryStar = visit_Try

    def visit_With(self, node):
        for item in node.items:
            self.visit(item)
        names = {n.id for item in node.items for n in ast.walk(item.context_expr) if isinstance(n, ast.Name)} & CATCHERS
        self.guarded([("in a block that catches it", names)] if names else [], lambda: self.block(node.body))

    visit_AsyncWith = visit_With

    def visit_AnnAssign(self, node):
        never = self.lazy or self.scopes[-1][1] == "function"
        self.guarded([("an annotation that is not evaluated", None)] if never else [], lambda: self.visit(node.annotation))
        self.visit(node.target)
        if node.value:
            self.visit(node.value)

    def visit_JoinedStr(self, node):
        outer, self.text = self.text, self.text or node
        self.generic_visit(node)
        self.text = outer

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.startswith("numpy."):
                self.use(alias.name, [node] * alias.name.count("."), 2, "ImportError", "import")

    def visit_ImportFrom(self, node):
        if not node.level and (node.module == "numpy" or node.module.startswith("numpy.")):
            for alias in node.names:
                path = node.module if alias.name == "*" else f"{node.module}.{alias.name}"
                self.use(path, [node] * path.count("."), 2, "ImportError", "import")

    def visit_Call(self, node):
        self.calls[id(node.func)] = node
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr" as word), args=[about, ast.Constant(value=str(name)), *rest]):
                if (found := self.numpy(about)) and name.isidentifier():
                    if word == "setattr":
                        self.given.add(f"{found[0]}.{name}")
                    elif word == "getattr" and not rest:
                        path = f"{found[0]}.{name}"
                        self.use(path, [node] * path.count("."), 2, "AttributeError", "getattr", found[3])
            case ast.Call(func=ast.Attribute(attr=name, value=owner)) if name in METHODS and not self.path(owner):
                other = (name == "newbyteorder" and "dt" in ast.unparse(owner)) or (name == "tostring" and (node.args or node.keywords))
                if not other:
                    self.use(f"numpy.ndarray.{name}", [node], 3, "AttributeError", "method", "if this is an array", node)
            case ast.Call(func=ast.Name() | ast.Attribute()) if (found := self.path(node.func)) and found[0] == "numpy.array":
                value = next((k.value for k in node.keywords if k.arg == "copy"), node.args[2] if len(node.args) > 2 else None)
                if value is not None and (not isinstance(value, ast.Constant) or value.value is False):
                    self.use("numpy.array", [node.func], 2, "ValueError", "copy", found[3] or self.may_be_array(node, value), node)
        self.generic_visit(node)

    def may_be_array(self, call, copy):
        """Return why numpy.array(…, copy=False) may do as it did before numpy 2."""
        what = call.args[0] if call.args else None
        if not isinstance(copy, ast.Constant):
            return "if it is false, and a copy is needed"
        if isinstance(what, ast.List | ast.Tuple | ast.ListComp) or (isinstance(what, ast.Name) and what.id in sequences(self.function)):
            return ""
        return "if a copy is needed"

    def visit_Attribute(self, node):
        found = self.numpy(node)
        if not found:
            self.generic_visit(node)
            return
        path, nodes, first, doubt = found
        if isinstance(node.ctx, ast.Load):
            bound = doubt != "by import *"  # then the import itself is the use of the first names
            self.use(path, nodes[bound:], first + bound, "AttributeError", doubt=doubt, call=self.calls.get(id(node)))
        else:
            self.given.add(path)

    def visit_Name(self, node):
        found = self.path(node) if isinstance(node.ctx, ast.Load) else None
        if found and found[3] == "by import *":
            self.use(*found[:3], "NameError", doubt=found[3], call=self.calls.get(id(node)))

    def generic_visit(self, node):
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.block(value)
            else:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child)


def read(path):
    """Return a file's bytes; b"" when it is not there any more."""
    return path.read_bytes() if path.is_file() else b""


def read_python(data):
    """Return (source as text, its encoding, Reader of it); SyntaxError or ValueError when this Python cannot read it."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    text = data.decode(encoding)
    return text, encoding, Reader(ast.parse(text), "global" in text)


def edit_import(node, name, span, source, table):
    """Return the edits that let `from numpy import NAME` import NAME's equivalent under the same name; [] where there is none."""
    new = {alias.name: table.get(alias.name, ("", ""))[1] for alias in node.names}
    at = next(number for number, alias in enumerate(node.names) if alias.name == name)
    alias = node.names[at]
    if new[name].startswith("np."):
        short = new[name].removeprefix("np.")
        return [(*span(alias), f"{short} as {alias.asname or name}")] if short.isidentifier() else []
    if not new[name].isidentifier():
        return []
    begin, end = span(node)
    gone = [a for a in node.names if new[a.name].isidentifier()]
    names = [new[a.name] + (f" as {a.asname or a.name}" if (a.asname or a.name) != new[a.name] else "") for a in gone]
    if len(gone) == len(node.names):
        return [(begin, end, f"from builtins import {', '.join(names)}")]
    indent = source[source.rfind(b"\n", 0, begin) + 1 : begin].decode()
    edits = [(begin, begin, f"from builtins import {', '.join(names)}" + ("; " if indent.strip() else f"\n{indent}"))]
    if any(a not in gone for a in node.names[at:]):
        return [*edits, (span(alias)[0], span(node.names[at + 1])[0], "")]
    return [*edits, (span([a for a in node.names if a not in gone][-1])[1], span(alias)[1], "")]


def edit_copy(node, call, span, source):
    """Return the edits of numpy.array(x, copy=False): numpy.asarray(x), or copy=None where that lacks an argument; [] by hand."""
    names = [keyword.arg for keyword in call.keywords]
    if len(call.args) not in (1, 2) or isinstance(call.args[0], ast.Starred) or {None, "object"} & set(names):
        return []
    at = names.index("copy")
    if not isinstance(node, ast.Attribute) or set(names) - {"dtype", "order", "copy"}:
        return [(*span(call.keywords[at].value), "None")]
    comma = source.index(b",", max(span(n)[1] for n in [*call.args, *call.keywords[:at]]))
    return [(span(node)[1] - len("array"), span(node)[1], "asarray"), (comma, span(call.keywords[at])[1], "")]


def edit(use, node, name, span, source, table):
    """Return the edits [(start, end, new text)] that put the equivalent of numpy.`name` in the place of a use; [] by hand."""
    new = table[name][1]
    if use.kind == "copy":
        return edit_copy(node, use.call, span, source)
    if use.kind == "import":
        return edit_import(node, name, span, source, table) if isinstance(node, ast.ImportFrom) and node.module == "numpy" else []
    start, end = span(node)
    if use.kind != "attribute" or not isinstance(node, ast.Attribute) or source[end - len(name) : end] != name.encode():
        return []
    if not new.startswith("np."):
        base = source[slice(*span(node.value))].decode()
        return [] if new in use.shadowed else [(start, end, new.replace("np.", f"{base}."))]
    new, call, after = new.removeprefix("np.").partition("()")
    edits = [(end - len(name), end, new)]
    if call:  # its result is changed too; its arguments have other names
        end = span(use.call)[1] if use.call and not {"ar1", "ar2"} & {keyword.arg for keyword in use.call.keywords} else 0
        edits = [*edits, (end, end, after)] if end else []
    return edits


def judge(file, text, reader, given, facts, table):
    """Return the Findings of a file's uses of numpy. `facts`: what the environment's numpy lacks; `given`: what the package sets."""
    source, findings = text.encode(), []
    table = {name: entry for name, entry in table.items() if "(" in name or facts["missing"].get(f"numpy.{name}", [0])[0] == 2}
    starts = [0, *(match.end() for match in re.finditer(rb"\n", source))]

    def span(node):
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    for use in reader.uses:
        count, words = (2, "") if use.kind == "copy" else facts["missing"].get(use.path, (0, ""))
        if count < use.first or (use.kind == "copy" and as_numbers(facts["version"]) < (2,)):
            continue
        symbol, node = ".".join(use.path.split(".")[:count]), use.nodes[count - use.first]
        name = "array(copy=False)" if use.kind == "copy" else symbol.partition(".")[2]
        removed, new, _ = table.get(name, ("", "", ""))
        doubt = use.doubt or ("the package sets it itself" if symbol in given else "")
        edits = edit(use, node, name, span, source, table) if new and not doubt and "\r" not in text else []
        if any(b"\n" in source[a:b] and b"#" in source[a:b] for a, b, _ in edits):
            edits = []
        if use.kind == "method":
            note = f"arrays lack it; write {METHODS[symbol.rpartition('.')[2]]}"
        elif new:
            note = f"changed in numpy {removed}" if use.kind == "copy" else f"removed in numpy {removed}"
            note += f"; write {new}" + ("" if edits or doubt else ", by hand")
        else:
            note = f"removed in numpy {removed}; {words}" if removed else words
        findings.append(Finding(file, node.lineno, f"numpy.{name}", note, doubt, edits))
    return findings


def words_of(text):
    """Return the strings and comments of a source."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type in (tokenize.STRING, tokenize.COMMENT)]


def edited(text, edits):
    """Return a source with edits made; ValueError when it would not compile any more, or a string or a comment would change."""
    source, merged = text.encode(), []
    for start, end, new in sorted(set(edits)):
        if merged and not new and not merged[-1][2] and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]), "")
        else:
            merged.append((start, end, new))
    for start, end, new in reversed(merged):
        source = source[:start] + new.encode() + source[end:]
    compile(source, "", "exec", dont_inherit=True)
    if words_of(text) != words_of(source.decode()):
        raise ValueError("a string or a comment would change")
    return source.decode()


def judge_module(file, path):
    """Return the Findings, under numpy 2, of a compiled module: one that looks for numpy 1's C interface, and for no other."""
    if not path.is_file() or not path.stat().st_size:
        return []
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(b"_ARRAY_API") < 0 or data.find(b"numpy._core") >= 0 or data.find(b"numpy.core") < 0:
            return []
        doubt = "only once an array is passed" if data.find(b"pybind11") >= 0 else ""
    note = "_ARRAY_API not found: compiled for numpy 1; no patch can help, pin numpy<2 or a release that was built for numpy 2"
    return [Finding(file, 0, "numpy 1 ABI", note, doubt)]


def ask(python, code, question):
    """Return what code answers, as JSON, in the environment of an interpreter; SystemExit when it does not."""
    try:
        asked = subprocess.run([python, "-I", "-c", code], input=json.dumps(question), capture_output=True, text=True, timeout=600)
        return json.loads(asked.stdout.splitlines()[-1])
    except (OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
        why = getattr(error, "strerror", None) or (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        raise SystemExit(f"scan_packages: {python}: {why}; --python must be Python 3.8 or newer, with numpy") from None


def find_packages(names, python):
    """Return the Packages of names and paths; SystemExit names one that is neither."""
    paths = {name: Path(name) for name in names if "/" in name or Path(name).is_file()}
    asked = [name for name in names if name not in paths]
    dists = ask(python, DISTRIBUTIONS, asked) if asked or not names else {}
    for name in names:
        if name not in dists and not (name in paths and paths[name].exists()):
            raise SystemExit(f"scan_packages: {name}: neither installed for {python} nor a path; install it, or write a folder as ./{name}")
    found = [Package(about["name"], about["version"], Path(about["root"]), about["files"]) for about in dists.values()]
    for name, path in paths.items():
        files = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path.name]
        found.append(Package(name, "", path if path.is_dir() else path.parent, files, f"{path if path.is_dir() else path.parent}/"))
    return found


def scan(packages, python, np_float):
    """Return ({package name: [Finding]}, {(package name, file): encoding}, numpy's version or "", the number of files,
    [(file, why it was not read)])."""
    readers, findings, modules, unread, count = {}, {package.name: [] for package in packages}, [], [], 0
    for number, package in enumerate(packages, 1):
        if sys.stderr.isatty():
            print(f"\r\033[K{number} of {len(packages)}: {package.name}", end="\r", file=sys.stderr, flush=True)
        for file in package.files:
            path = package.root / file
            count += path.suffix in (".py", ".so", ".pyd")
            try:
                if path.suffix == ".py" and b"numpy" in (data := read(path)):
                    readers[package.name, file] = read_python(data)
                elif path.suffix in (".so", ".pyd"):
                    modules += [(package, finding) for finding in judge_module(package.shown + file, path)]
            except (SyntaxError, ValueError, RecursionError) as error:
                unread.append((package.shown + file, str(error)))
    wanted = sorted({use.path for _, _, reader in readers.values() for use in reader.uses})
    facts = ask(python, NUMPY, wanted) if wanted or modules else {"version": "", "missing": {}}
    for package in packages:
        mine = {file: read for (name, file), read in readers.items() if name == package.name}
        given = set().union(*(reader.given for _, _, reader in mine.values()))
        for file, (text, _, reader) in mine.items():
            findings[package.name] += judge(package.shown + file, text, reader, given, facts, removed_names(np_float))
    for package, finding in modules if as_numbers(facts["version"]) >= (2,) else ():
        findings[package.name].append(finding)
    return findings, {key: encoding for key, (_, encoding, _) in readers.items()}, facts["version"], count, unread


def patch_of(package, findings, encodings, np_float):
    """Return the bytes of a patch file that makes the edits of a package's findings; b"" when there are none. Files of which the
    edits would not compile, or would change a string, are left out, with a word on stderr."""
    table, diffs, hashes, done = removed_names(np_float), [], [], []
    for file in dict.fromkeys(finding.file for finding in findings if finding.edits):
        mine, encoding, old = [f for f in findings if f.file == file and f.edits], encodings[package.name, file], read(package.root / file)
        try:
            new = edited(old.decode(encoding), [edit for f in mine for edit in f.edits]).encode(encoding)
        except (SyntaxError, ValueError) as error:
            print(f"scan_packages: {file}: to be mended by hand: {error}", file=sys.stderr)
            continue
        lines = [re.findall(rb"[^\n]*\n|[^\n]+$", data) for data in (old, new)]
        for line in difflib.diff_bytes(difflib.unified_diff, *lines, f"a/{file}".encode(), f"b/{file}".encode()):
            diffs.append(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n")
        hashes.append(f" {file} {hashlib.sha256(old).hexdigest()} {hashlib.sha256(new).hexdigest()}\n")
        done += [f.symbol.removeprefix("numpy.") for f in mine]
    if not done:
        return b""
    gates = [min(as_numbers(table[name][0]) for name in done), *(as_numbers(table[name][2]) for name in done)]
    each = "".join(f" np.{name} -> {table[name][1]} ({done.count(name)})\n" for name in dict.fromkeys(done))
    head = f"Description: use the present names of what numpy has removed\n{each}Origin: vendor, by scan_packages.py\nForwarded: no\n"
    head += f"X-Package: {package.name}\nX-Versions: =={package.version}\nX-Env: numpy>={'.'.join(map(str, max(gates)))}\nX-Sha256:\n"
    return head.encode() + "".join(hashes).encode() + b"".join(diffs)


def as_numbers(release):
    """Return a release of numpy as numbers that compare: "1.24" -> (1, 24); "" -> ()."""
    return tuple(map(int, re.findall(r"\d+", release)[:2]))


def write_patch(target, package, data, overwrite):
    """Write a patch file, or one in a folder of patches with its line in the series; return its path. SystemExit(3) if another is there."""
    path = target
    if target.suffix != ".patch":
        folder = target / re.sub(r"[-_.]+", "-", package.name).lower()
        there = sorted(folder.glob("*.patch"))
        path = next((p for p in there if p.read_bytes() == data), None)
        path = path or folder / f"{max((int(p.name[:4]) for p in there if p.name[:4].isdigit()), default=0) + 1:04}-numpy-names.patch"
    if path.exists() and path.read_bytes() != data and not overwrite:
        print(f"scan_packages: {path} is another patch; move it away, or add --overwrite", file=sys.stderr)
        raise SystemExit(3)
    with write_atomic(path) as file:
        file.write(data)
    if target.suffix != ".patch":
        series = target / "series"
        lines = series.read_text(encoding="utf-8").splitlines() if series.exists() else []
        name = path.relative_to(target).as_posix()
        with write_atomic(series, "w") as file:
            file.writelines(f"{line}\n" for line in (lines if name in lines else [*lines, name]))
    return path


def build_parser():
    parser = argparse.ArgumentParser(
        prog="scan_packages.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("package", nargs="*", metavar="PACKAGE", help="distribution, module, or ./path (default: all that is installed)")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="interpreter of the environment (default: this one)")
    parser.add_argument("--np-float", choices=["float", "float64"], default="float", help="what to write for np.float (default: float)")
    parser.add_argument("--write", type=Path, metavar="FILE.patch|DIR", help="make a patch, or one for each package in a folder")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="let --write replace another patch")
    parser.add_argument("--json", action=argparse.BooleanOptionalAction, default=False, help="findings as JSON")
    return parser


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    parser = build_parser()
    args = parser.parse_args()
    packages = find_packages(args.package, args.python)
    if args.write and (not all(p.version for p in packages) or (args.write.suffix == ".patch" and len(packages) != 1)):
        parser.error("--write takes installed packages, not paths, and FILE.patch exactly one")
    try:
        findings, encodings, version, count, unread = scan(packages, args.python, args.np_float)
        written = {}
        for package in packages if args.write else ():
            data = patch_of(package, findings[package.name], encodings, args.np_float)
            if data:
                written[package.name] = str(write_patch(args.write, package, data, args.overwrite))
    except OSError as error:
        raise SystemExit(f"scan_packages: {error.filename}: {error.strerror}; mend that and run it again") from None
    rows = [
        {"package": name, "file": f.file, "line": f.line, "level": f.level, "symbol": f.symbol, "note": f.note, "doubt": f.doubt}
        | {"mended": bool(f.edits)}
        for name, found in findings.items()
        for f in sorted(found, key=lambda f: (f.file, f.line))
    ]
    if args.json:
        missed = [{"file": file, "reason": why} for file, why in unread]
        print(json.dumps({"numpy": version, "files": count, "findings": rows, "unread": missed, "patches": written}, indent=1))
    else:
        for row in rows:
            doubt = f" ({row['doubt']})" if row["doubt"] else ""
            place = f"{row['file']}:{row['line']}" if row["line"] else row["file"]
            print(f"{place}: {row['level']}: {row['symbol']}: {row['note']}{doubt}")
    for file, why in unread if not args.json else ():
        print(f"scan_packages: {file} was not read: {why}", file=sys.stderr)
    sure, mended = sum(row["level"] == "certain" for row in rows), sum(row["mended"] for row in rows)
    told = f"{sure} certain, {len(rows) - sure} possible; --write can mend {mended}"
    print(f"{count} files, numpy {version or 'not used'}: {told}", file=sys.stderr)
    for name, path in written.items():
        print(f"{name}: {path}; add X-Probe and X-Raises, the call that failed, and run patch_packages.py apply", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
