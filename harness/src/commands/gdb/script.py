# Run by gdb for `hmmstorm gdb`: connects to the guest, loads the symbols of each module as the kernel loads it, and
# sets breakpoints at functions that the harness has found (Rust's mangled names have no good spelling in gdb).
#
# HMMSTORM_GDB names a JSON file written by commands/gdb/mod.rs:
#   socket       QEMU's gdb stub
#   modules      {name: unstripped .ko}
#   functions    file with all functions [{name, module, section, address}], for hs-break
#   breaks       functions to stop in, as above
#   result       batch mode: file to write what happened to; null: interactive

import json
import os

import gdb

CONFIG = json.load(open(os.environ["HMMSTORM_GDB"]))


def say(text):
    gdb.write("hmmstorm: {}\n".format(text))


class Modules:
    """Loaded modules, and breakpoints in those that are not loaded yet."""

    def __init__(self):
        self.sections = {}
        self.waiting = [f for f in CONFIG["breaks"] if f["module"]]
        self.targets = set()
        self.loaded_now = False

    def want(self, function):
        """Stops in a function, now or when its module comes."""
        if function["module"] and function["module"] not in self.sections:
            self.waiting.append(function)
            say("will stop in {} when {} is loaded".format(function["name"], function["module"]))
        else:
            self.stop_in(function)

    def stop_in(self, function):
        address = function["address"]
        if function["module"]:
            base = self.sections[function["module"]].get(function["section"])
            if base is None:
                say("{} is in {}, which the kernel has freed".format(function["name"], function["section"]))
                return
            address += base
        # vmlinux is not in memory before the guest has started, and only a hardware breakpoint needs no memory.
        kind = gdb.BP_BREAKPOINT if function["module"] else gdb.BP_HARDWARE_BREAKPOINT
        breakpoint = gdb.Breakpoint("*{:#x}".format(address), type=kind)
        self.targets.add(breakpoint.number)
        say("breakpoint {} at {:#x}: {}".format(breakpoint.number, address, function["name"]))

    def load(self, module):
        """Reads where the kernel has put the module's sections, and the module's symbols."""
        name = module["name"].string()
        attributes = module["sect_attrs"]["grp"]["bin_attrs"]
        sections = {}
        index = 0
        while attributes[index]:
            attribute = attributes[index].dereference()
            sections[attribute["attr"]["name"].string()] = int(attribute["private"])
            index += 1
        self.sections[name] = sections
        path = CONFIG["modules"].get(name)
        if path is None:
            say("no symbols for module {}".format(name))
            return
        wanted = [s for s in sorted(sections) if s.startswith((".text", ".data", ".rodata", ".bss", ".init.text"))]
        arguments = " ".join("-s {} {:#x}".format(s, sections[s]) for s in wanted)
        # Linked from Rust and C parts, a module has indexes (.debug_aranges, .debug_names) that gdb throws away, and
        # then finds no line by address unless it reads everything at once.
        gdb.execute("add-symbol-file {} {} -readnow".format(path, arguments), to_string=True)
        say("symbols of {} loaded (.text at {:#x})".format(name, sections.get(".text", 0)))

    def arm(self):
        """Sets the breakpoints whose modules are there by now."""
        ready = [f for f in self.waiting if f["module"] in self.sections]
        self.waiting = [f for f in self.waiting if f["module"] not in self.sections]
        for function in ready:
            self.stop_in(function)


MODULES = Modules()


class ModuleLoaded(gdb.Breakpoint):
    """Every module passes here once its sections are in place and before its code runs."""

    def __init__(self):
        super().__init__("do_init_module", type=gdb.BP_HARDWARE_BREAKPOINT, internal=True)
        self.silent = True

    def stop(self):
        try:
            MODULES.load(gdb.selected_frame().read_var("mod"))
        except (gdb.error, gdb.MemoryError, ValueError) as error:
            say("cannot read the module's sections: {}".format(error))
        # Breakpoints must not be made here: stop if there are some to make.
        MODULES.loaded_now = any(f["module"] in MODULES.sections for f in MODULES.waiting)
        return MODULES.loaded_now


class Break(gdb.Command):
    """hs-break TEXT: stops in all functions of kernel and modules whose readable name has TEXT in it.

    Rust functions are found by their readable name, as in `hs-break migrate_to_ram`; of several kinds of match the
    closest is taken (whole name, last component, part of the name)."""

    functions = None

    def __init__(self):
        super().__init__("hs-break", gdb.COMMAND_BREAKPOINTS)

    def invoke(self, argument, from_tty):
        wish = argument.strip()
        if not wish:
            raise gdb.GdbError("hs-break: which function?")
        if Break.functions is None:
            Break.functions = json.load(open(CONFIG["functions"]))
        for matches in (
            lambda name: name == wish,
            lambda name: name.endswith("::" + wish),
            lambda name: wish in name,
        ):
            found = [f for f in Break.functions if matches(f["name"])]
            if found:
                break
        if not found:
            raise gdb.GdbError("hs-break: no function has '{}' in its name".format(wish))
        if len(found) > 16:
            names = "\n  ".join(f["name"] for f in found[:16])
            raise gdb.GdbError("hs-break: {} functions match, among them\n  {}".format(len(found), names))
        for function in found:
            MODULES.want(function)


def arm_at_stop(event):
    """Interactive: a stop at a module's load that only served to set breakpoints. Going on is left to the user: a
    `continue` of ours would take the prompt away."""
    if MODULES.loaded_now:
        MODULES.loaded_now = False
        MODULES.arm()
        say("the breakpoints in it are set; `continue` runs the module")


def source_line():
    """The line that the stop is at, or why it cannot be shown."""
    try:
        line = gdb.selected_frame().find_sal().line
        return gdb.execute("list {0},{0}".format(line), to_string=True) if line else ""
    except gdb.error as error:
        return "no source: {}\n".format(error)


def batch():
    """Runs until one of the breakpoints is hit; says so in the result file."""
    result = {"reached": False, "why": "the guest ended first"}
    hits = []

    def stopped(event):
        if isinstance(event, gdb.BreakpointEvent):
            hits.extend(b.number for b in event.breakpoints if b.number in MODULES.targets)

    gdb.events.stop.connect(stopped)
    try:
        while True:
            gdb.execute("continue", to_string=True)
            if gdb.selected_inferior().pid == 0:
                break
            if hits:
                result = {
                    "reached": True,
                    "why": "breakpoint {}".format(hits[0]),
                    "backtrace": gdb.execute("backtrace 40", to_string=True) + source_line(),
                }
                break
            MODULES.arm()
    except gdb.error as error:
        result["why"] = str(error)
    with open(CONFIG["result"], "w") as file:
        json.dump(result, file)


for line in ("pagination off", "confirm off", "print pretty on", "python print-stack full"):
    gdb.execute("set " + line)
gdb.execute("target remote " + CONFIG["socket"], to_string=True)
ModuleLoaded()
Break()
for function in CONFIG["breaks"]:
    if not function["module"]:
        MODULES.stop_in(function)
if CONFIG["result"]:
    batch()
    try:
        gdb.execute("kill")
    except gdb.error:
        pass  # the stub hangs up as it dies
    gdb.execute("quit")
else:
    gdb.events.stop.connect(arm_at_stop)
    say("the guest waits at its first instruction; `continue` boots it")
    say("modules: {} (symbols come as they load); hs-break TEXT stops in functions by readable name".format(
        ", ".join(sorted(CONFIG["modules"]))))
    say("the kernel's lx-... commands speak C: in a Rust frame, `set language c` first")
