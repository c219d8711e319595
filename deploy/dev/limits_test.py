#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Samples that limits.py must accept or refuse."""
import sys
from pathlib import Path

import limits

SPDX = "// " + limits.SPDX + "\n"
LONG = "  step();\n" * 80
SHORT = "  step();\n" * 8

# Name, text, part of each expected message.
CASES = (
    ("a.cc", SPDX + "void f() {\n" + SHORT + "}\n", ()),
    ("a.cc", SPDX + "void f() {\n" + LONG + "}\n", ("function of 81",)),
    ("a.cc", SPDX + "namespace a {\nclass B {\n int f() const noexcept {\n" + LONG + "}\n};\n}\n", ("function of 81",)),
    ("a.cc", SPDX + "A::A(int x) : a_{x}, b_(2), c_{x} {\n" + LONG + "}\n", ("function of 81",)),
    ("a.cc", SPDX + "A::A(int x) : a_{x} {}\nint b[] = {\n" + "  1,\n" * 90 + "};\n", ()),
    ("a.cc", SPDX + "namespace {\n" + "void f() {\n" + SHORT + "}\n" * 1 + "}\n" + "int x;\n" * 90, ()),
    ("a.cc", SPDX + "struct S {\n" + "  int a;\n" * 90 + "};\n", ()),
    ("a.cc", SPDX + 'const char* t = R"x(\n' + "void f() {\n" * 90 + ')x";\nint g() { return 1; }\n', ()),
    ("a.cc", SPDX + "/* void f() {\n" + LONG + "} */\nconstexpr int k = 1'000'000;\nvoid f() {\n" + SHORT + "}\n", ()),
    ("a.cc", SPDX + "char c = '{';\nvoid f() {\n" + SHORT + "}\n" + "int x;\n" * 90, ()),
    ("a.cc", SPDX + "TEST(Ring, WrapsAtTheEnd) {\n" + LONG + "}\n", ("function of 81",)),
    ("a.cc", SPDX + "template <typename A, class B>\nvoid f(B b) {\n" + LONG + "}\n", ("function of 81",)),
    ("a.cc", SPDX + 'extern "C" int f(void) {\n' + LONG + "}\n", ("function of 81",)),
    ("a.cc", SPDX + "class alignas(64) A {\n" + "  int a;\n" * 90 + "};\n", ()),
    ("a.cc", SPDX + "#define M(x) { \\\n  x }\nvoid f() {\n" + SHORT + "}\n", ()),
    ("a.cc", SPDX + "int x;\n" * 500, ("501 lines",)),
    ("a.cc", "int x;\n", ("first line",)),
    ("a.py", "#!/usr/bin/env python3\n# " + limits.SPDX + "\n", ()),
    ("a.py", "#!/usr/bin/env python3\nx = 1\n", ("first line",)),
    ("a.py", "# " + limits.SPDX + "\ndef f():\n" + "    g()\n" * 80, ("function of 80",)),
    ("tool", "#!/bin/sh\necho\n", ("first line",)),
    ("daemon/a.cc", SPDX + "auto t = std::chrono::system_clock::now();\n", ("the wall clock",)),
    ("client/a.h", SPDX + "int t = clock_gettime(CLOCK_REALTIME_COARSE, &now) + sem_timedwait(s, &now);\n", ("wall",) * 2),
    ("daemon/a.cc", SPDX + "time_t t = time(nullptr) + std::time(0);\n", ("the wall clock",) * 2),
    ("daemon/a.cc", SPDX + "// system_clock\nauto t = steady(0) + wait.time(0) + lifetime(0);\nauto u = time(steady);\n", ()),
    ("daemon/base/log.cc", SPDX + "int t = clock_gettime(CLOCK_REALTIME, &now);\n", ()),
    ("tests/a.cc", SPDX + "auto t = std::chrono::system_clock::now();\n", ()),
    ("a.md", "x\n" * 900, ()),
    ("a.md", limits.TODO_NOW + ": finish\n", ("does not land",)),
    ("a.md", "see /" + "home/somebody/tree\n", ("path of one machine",)),
    ("a.md", "cd '/" + "work/tree'\n", ("path of one machine",)),
    ("a.md", "deploy/" + "work/tree, $D/" + "root/usr and https://host/" + "home/x\n", ()),
)


def main():
    failures = []
    for number, (name, text, wanted) in enumerate(CASES):
        found = [message for _, message in limits.check_file(Path(name), text)]
        if len(found) != len(wanted) or not all(w in f for w, f in zip(wanted, found)):
            failures.append(f"case {number} ({name}): wanted {wanted}, got {found}")
    print("\n".join(failures) if failures else f"limits_test: {len(CASES)} cases")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
