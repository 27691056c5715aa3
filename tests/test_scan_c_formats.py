"""scripts/scan_c_formats.py on C of every kind, and on real source distributions that ship the fault."""

import json
import random
import shutil
import subprocess
import sys
import tarfile

import pytest

HEAD = "#include <Python.h>\nstatic PyObject *f(PyObject *self, PyObject *args)\n{\n    const char *s;\n"
CLEAN = "#define PY_SSIZE_T_CLEAN\n"
PARSE = 'PyArg_ParseTuple(args, "s#", &s, &n)'
MACRO, LENGTH = "PY_SSIZE_T_CLEAN is not defined", "`#` takes a Py_ssize_t"


@pytest.fixture
def found(run_script, tmp_path):
    """found(source, **files): [(line, "macro" or "length", level)] in module.c, with other files beside it."""

    def run(source, **files):
        folder = tmp_path / "source"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in {"module_c": source, **files}.items():
            (folder / name.replace("_", ".")).write_text(text)
        done = run_script("scan_c_formats.py", folder, "--json")
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        rows = [row for row in json.loads(done.stdout) if row["file"].endswith("module.c")]
        assert all(MACRO in row["note"] or LENGTH in row["note"] or "not understood" in row["note"] for row in rows)
        return [(row["line"], "macro" if MACRO in row["note"] else "length", row["level"]) for row in rows]

    return run


def body(*lines, head=CLEAN):
    return head + HEAD + "".join(f"    {line}\n" for line in lines) + "}\n"


def test_the_fault_and_its_mended_form(found):
    assert found(body("int n;", f"return {PARSE};", head="")) == [(6, "macro", "certain"), (6, "length", "certain")]
    assert found(body("int n;", f"return {PARSE};")) == [(7, "length", "certain")]
    assert found(body("Py_ssize_t n;", f"return {PARSE};", head="")) == [(6, "macro", "certain")]
    assert found(body("Py_ssize_t n;", f"return {PARSE};")) == []


LINES = {  # the lines of a function, with the macro: the levels of what is found
    ("unsigned int a = 1, *b, n;", f"return {PARSE};"): ["certain"],
    ("int n[2];", 'return PyArg_ParseTuple(args, "s#", &s, &n[1]);'): ["certain"],
    ("int n;", 'return PyArg_Parse(args, "s#", &s, (int *)&n);'): ["certain"],
    ("int n;", "{ Py_ssize_t n; }", f"return {PARSE};"): ["certain"],
    ("Py_ssize_t n;", "{ int n; }", f"return {PARSE};"): [],
    ("int n;", f"{{ Py_ssize_t n; return {PARSE}; }}"): [],
    ("int a; Py_ssize_t n; int b;", 'return PyArg_ParseTuple(args, "i|s#$O!O&(ii):n#", &a, &s, &n, t, &o, c, &o, &b, &b);'): [],
    ("int a; int n;", 'return PyArg_ParseTuple(args, "es#s*O!ns#", e, &s, &n, &v, t, &o, &n, &s, &a);'): ["certain", "certain"],
    ("int n;", 'return PyArg_ParseTupleAndKeywords(args, k, "s#", list, &s, &n);'): ["certain"],
    ("int n;", 'return PyArg_ParseTuple(args, "s" /* "s#" */ "#", // &x', "        &s, &n);"): ["certain"],
    ("int n;", "return PyArg_ParseTuple(args,", "#if PY3", '        "y#",', "#else", '        "s#",', "#endif", "        &s, &n);"): [
        "certain"
    ],
    (
        "Py_ssize_t n;",
        "return PyArg_ParseTuple(args,",
        "#if PY3",
        '        "y#",',
        "#else",
        '        "s#",',
        "#endif",
        "        &s, &n);",
    ): [],
    ("int n;", '#define FORMAT "s#"', "return PyArg_ParseTuple(args, FORMAT, &s, &n);"): ["certain"],
    ("int n;", 'return PyArg_ParseTuple(args, UNKNOWN "s#", &s, &n);'): ["possible"],
    ("strange_t n;", f"return {PARSE};"): ["possible"],
    ("long n;", f"return {PARSE};"): ["possible"],
    ("size_t n;", f"return {PARSE};"): [],
    ("std::size_t n;", f"return {PARSE};"): [],
    ("struct { int n; } t;", 'return PyArg_ParseTuple(args, "s#", &s, &t.n);'): ["possible"],
    ("struct { Py_ssize_t n; } *t;", 'return PyArg_ParseTuple(args, "s#", &s, &t->n);'): [],
    ('return Py_BuildValue("{s:i,s:s#}", "a", 1, "b", s, (Py_ssize_t)3);',): [],
    ('return Py_BuildValue("s#", s, strlen(s));', 'return Py_BuildValue("y#", s, PyBytes_GET_SIZE(o));'): [],
    ('return Py_BuildValue("s#", s, 3);',): ["possible"],
    ('return Py_BuildValue("s#", s, (int)3);',): ["certain"],
    ('return PyObject_CallFunction(o, "s#", t.data(), t.size());',): [],
    ("int n = 0;", 'return PyObject_CallMethod(o, "name", "s#", s, n);'): ["certain"],
    ("int n;", 'return PyArg_ParseTuple(args, "s#", &s);'): ["possible"],
    ("int n;", '/* PyArg_ParseTuple(args, "s#", &s, &n); */', '// PyArg_ParseTuple(args, "s#", &s, &n)', 's = "PyArg_ParseTuple(";'): [],
    ("int n;", 'char c = \'"\'; return PyArg_ParseTuple(args, "s#", &s, &n); // "'): ["certain"],
    ("int n;", 's = R"x(PyArg_ParseTuple(args, "s#", &s, &n))x";'): [],
    ("int n;", "#define READ(a) \\", '    PyArg_ParseTuple(a, "s#", &s, &n)', "return READ(args);"): ["certain"],
    ("int n;", 'PyErr_Format(e, "#%d s#", n);', 'printf("s#", n);', 'return PyArg_ParseTuple(args, "si", &s, &n);'): [],
}


def test_each_way_to_write_it(found):
    for lines, levels in LINES.items():
        assert [level for _, _, level in found(body(*lines))] == levels, lines


def test_where_the_macro_may_be(found):
    call = ("Py_ssize_t n;", f"return {PARSE};")
    late = HEAD.replace("#include <Python.h>\n", "#include <Python.h>\n#define PY_SSIZE_T_CLEAN\n")
    assert found(late + "Py_ssize_t n;\n" + PARSE + ";}\n") == [(7, "macro", "certain")]
    assert found(body(*call, head='#include "other.h"\n'), other_h="  #  define PY_SSIZE_T_CLEAN 1\n#include <Python.h>\n") == []
    assert found(body(*call, head='#include "other.h"\n'), other_h="#include <Python.h>\n") == [(7, "macro", "certain")]
    assert found(body(*call, head="").replace("<Python.h>", '"elsewhere.h"'), other_h="") == [(6, "macro", "possible")]
    build = "define_macros=[('PY_SSIZE_T_CLEAN', None)]\n"
    assert found(body(*call, head=""), other_h="", setup_py=build) == [(6, "macro", "possible")]


def test_no_source_stops_the_scan(run_script, tmp_path):
    """Cut off and mixed up at random, any text is read: 300 sources, no traceback."""
    draw, pieces = random.Random(7), body("int n;", f"return {PARSE};", '#define X "s#', 'R"a(', "/*", "'", "\\").encode()
    for number in range(300):
        cut = bytearray(pieces * 2)
        for _ in range(draw.randrange(1, 30)):
            at = draw.randrange(len(cut))
            cut[at : at + draw.randrange(4)] = draw.choice(
                [b"", b"(", b")", b'"', b"{", b"}", b"#", b"\\\n", b"\0", b"\xff", b",", b";", b"*/"]
            )
        (tmp_path / f"m{number}.c").write_bytes(bytes(cut))
    (tmp_path / "m0.c").write_text('#include "m0.c"\nPyArg_ParseTuple')
    done = run_script("scan_c_formats.py", tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "300 sources" in done.stderr
    assert run_script("scan_c_formats.py", tmp_path / "none").returncode == 1
    assert run_script("scan_c_formats.py").returncode == 2


def unpacked(requirement, folder):
    """Return the folder of a source distribution from the registry."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder]
    subprocess.run([*pip, requirement], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.mark.slow
def test_real_distributions(run_script, tmp_path):
    """mmh3 2.3.1 lacks the macro and has int lengths; pycld2 0.41 has the macro, and an int all the same; nothing else is said of them."""
    expected = {
        "mmh3==2.3.1": {(line, kind, "certain") for line in (34, 59, 86, 119) for kind in ("macro", "target_str_len is of type int")},
        "pycld2==0.41": {(90, "numBytes is of type int", "certain")},
    }
    for requirement, rows in expected.items():
        folder = tmp_path / requirement
        folder.mkdir()
        done = run_script("scan_c_formats.py", unpacked(requirement, folder), "--json")
        found = json.loads(done.stdout)
        assert {(r["line"], "macro" if MACRO in r["note"] else r["note"].partition(";")[0], r["level"]) for r in found} == rows
        assert len(found) == len(rows)
