# Reads the cycle out of a stopped guest's memory with drgn: no line of a log is looked at. structures/mod.rs runs it
# with one JSON object on stdin (Request) and one on stdout (Reading), and makes sentences of what it says.

import json
import os
import re
import sys

CONFIG = json.load(sys.stdin)
sys.path.insert(0, CONFIG["drgn"])

import drgn
from drgn import Object, Program
from drgn.helpers.linux import for_each_task
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import PageLocked, compound_head
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.sched import cpu_curr, get_task_state, task_cpu

# A swap entry in a page table: its type in the top bits, its offset inverted and shifted
# (arch/x86/include/asm/pgtable_64.h: __swp_offset()).
SWP_TYPE_BITS = 5
SWP_OFFSET_SHIFT = 14
# arch/x86/include/asm/pgtable_64_types.h: where the pages' descriptors are unless the kernel moves them about.
VMEMMAP_BASE = 0xFFFFEA0000000000
# include/linux/migrate.h
MIGRATE_PFN_MIGRATE = 1 << 1
MIGRATE_PFN_SHIFT = 6
# arch/x86/include/asm/pgtable_types.h
PAGE_PRESENT = 1 << 0
PAGE_PSE = 1 << 7
ADDRESS_MASK = ((1 << 52) - 1) & ~0xFFF

# Names of `info registers` by fields of `struct pt_regs`.
REGISTERS = {
    "r15": "R15", "r14": "R14", "r13": "R13", "r12": "R12", "bp": "RBP", "bx": "RBX", "r11": "R11", "r10": "R10",
    "r9": "R9", "r8": "R8", "ax": "RAX", "cx": "RCX", "dx": "RDX", "si": "RSI", "di": "RDI", "ip": "RIP",
    "flags": "RFL", "sp": "RSP",
}  # fmt: skip

# Functions that tell better what a sleeper waits for than the ones below them do.
SLEEPS = ("__lru_add_drain_all", "migration_entry_wait_on_locked", "folio_wait_bit_common")

# Functions below those that tell what a task was doing when it left its CPU.
SCHEDULING = re.compile(r"(__)?(sched|context_switch|switch_to|preempt_schedule)|.*sleep_range|.*hrtimer|.*[fm]sleep$")

# Functions that make an access; the outermost of a stack is the one that makes it again.
ACCESSES = ("do_swap_page", "handle_mm_fault", "hmm_range_fault", "exc_page_fault", "fixup_user_fault")

NOTES = []


def note(what, error):
    NOTES.append("{}: {}: {}".format(what, type(error).__name__, error))


def open_guest(config):
    memory = open(config["memory"], "rb", buffering=0)
    info = config["vmcoreinfo"].encode()
    prog = Program(drgn.Platform(drgn.Architecture.X86_64), vmcoreinfo=info)
    for segment in config["segments"]:

        def read(address, count, _offset, _physical, segment=segment):
            return os.pread(memory.fileno(), count, address - segment["start"] + segment["offset"])

        prog.add_memory_segment(segment["start"], segment["length"], read, True)
    prog.set_linux_kernel_custom(info, True)
    prog.load_debug_info([config["vmlinux"], *config["modules"]])
    return prog


def cpu_registers(text):
    """Registers by CPU, of the CPUs that execute kernel code."""
    found = {}
    for block in re.split(r"^CPU#", text, flags=re.M)[1:]:
        values = {name: int(value, 16) for name, value in re.findall(r"\b([A-Z0-9]{2,3}) ?=([0-9a-f]{8,16})\b", block)}
        state = re.search(r"CPL=(\d).*HLT=(\d)", block)
        if state and state.groups() == ("0", "0"):
            found[int(block.split(None, 1)[0])] = values
    return found


def stack_of(prog, values):
    fields = {field: values[name] for field, name in REGISTERS.items()}
    return prog.stack_trace(Object(prog, "struct pt_regs", fields))


def variable(frame, *names):
    """The first of these variables that the debug information still finds in the frame."""
    for name in names:
        try:
            value = frame[name]
            if not value.absent_:
                return value
        except (KeyError, LookupError):
            continue
    return None


def wanted(trace):
    """(mm, address) of the access that a stack is about, from the innermost frame that says it."""
    for frame in trace:
        try:
            if frame.name == "do_swap_page" and (vmf := variable(frame, "vmf")) is not None:
                return vmf.vma.vm_mm, vmf.real_address.value_() & ~0xFFF
            if frame.name == "handle_mm_fault":
                vma, address = variable(frame, "vma"), variable(frame, "address")
                if vma is not None and address is not None:
                    return vma.vm_mm, address.value_() & ~0xFFF
            if frame.name == "hmm_range_fault":
                walk = variable(frame, "hmm_vma_walk")
                if walk is not None:
                    return walk.range.notifier.mm, walk.last.value_() & ~0xFFF
        except drgn.FaultError:
            continue
    return None, None


def entry_at(prog, mm, address):
    """(entry, size of what it maps): the last entry on the way to an address."""
    entry = prog.read_u64(mm.pgd.value_() + ((address >> 39) & 511) * 8)
    for shift in (30, 21, 12):
        if not entry & PAGE_PRESENT or (shift < 21 and entry & PAGE_PSE):
            return entry, 1 << (shift + 9)
        entry = prog.read_u64((entry & ADDRESS_MASK) + ((address >> shift) & 511) * 8, True)
    return entry, 1 << 12


def pfn_to_page(prog, pfn):
    try:
        base = prog["vmemmap_base"].value_()
    except LookupError:
        base = VMEMMAP_BASE
    return Object(prog, "struct page *", base) + pfn


def folio_of_swap_entry(prog, entry):
    """What a non-present entry points to, if it is a page: (pfn, locked, type of its memory or None)."""
    pfn = ((~entry & ((1 << 64) - 1)) << SWP_TYPE_BITS & ((1 << 64) - 1)) >> SWP_OFFSET_SHIFT
    page = compound_head(pfn_to_page(prog, pfn))
    memory = None
    try:
        kind = page.pgmap.type if hasattr(page, "pgmap") else Object(prog, "struct folio *", page.value_()).pgmap.type
        memory = kind.format_(type_name=False)
    except (drgn.FaultError, AttributeError, LookupError):
        pass  # a page of another kind has something else there
    return pfn, bool(PageLocked(page)), page.value_(), memory


def spinners(prog, registers):
    for cpu, values in sorted(registers.items()):
        try:
            task = cpu_curr(prog, cpu)
            trace = stack_of(prog, values)
            mm, address = wanted(trace)
            if mm is None:
                continue
            makes = [frame.name for frame in trace if frame.name in ACCESSES]
            found = {"cpu": cpu, "task": task_of(task), "function": makes[-1] if makes else None, "address": address, "mm": mm.value_()}
            entry, size = entry_at(prog, mm, address)
            found.update(entry=entry, size=size)
            if entry and not entry & PAGE_PRESENT:
                pfn, locked, page, memory = folio_of_swap_entry(prog, entry)
                found.update(pfn=pfn, locked=locked, folio=page, memory=memory)
            yield found
        except (drgn.FaultError, LookupError, ValueError) as error:
            note("CPU {}".format(cpu), error)


def task_of(task):
    return {"pid": task.pid.value_(), "comm": task.comm.string_().decode(errors="replace")}


def waits_for(prog, trace):
    """What a sleeper in __lru_add_drain_all() waits for: the work item of a CPU, and what runs there."""
    frame = next((f for f in trace if f.name == "__lru_add_drain_all"), None)
    cpu = variable(frame, "cpu") if frame is not None else None
    if cpu is None:
        return None
    cpu = cpu.value_()
    work = per_cpu(prog["lru_add_drain_work"], cpu)
    pool = per_cpu(prog["cpu_worker_pools"], cpu)[0]
    address = work.address_of_().value_()
    queued = any(
        item.value_() == address
        for item in list_for_each_entry("struct work_struct", pool.worklist.address_of_(), "entry")
    )
    workers = list(list_for_each_entry("struct worker", pool.workers.address_of_(), "node"))
    # process_one_work() may give its CPU away between the item's function and forgetting the item, which is what the sleeper
    # waits for.
    begun = [w for w in workers if w.current_work.value_() == address and not w.task.on_cpu.value_()]
    worker = next((w for w in begun + workers if w.task.__state.value_() == 0), None)
    data = work.data.counter.value_()
    queue = None
    if data & (1 << prog["WORK_STRUCT_PWQ_BIT"].value_()):
        shift = prog["WORK_STRUCT_PWQ_SHIFT"].value_()
        pwq = Object(prog, "struct pool_workqueue *", data >> shift << shift & (1 << 64) - 1)
        queue = pwq.wq.name.string_().decode(errors="replace")
    return {
        "work": address,
        "function": prog.symbol(work.func.value_()).name,
        "workqueue": queue,
        "cpu": pool.cpu.value_(),
        "queued": queued,
        "begun": worker is not None and worker in begun,
        "worker": task_of(worker.task) if worker is not None else None,
        "current": task_of(cpu_curr(prog, cpu)),
    }


def ready(prog, task):
    """Of a task that is ready to run and does not: the CPU on whose run queue it is, and what runs there."""
    if get_task_state(task)[0] != "R" or task.on_cpu.value_() or not task.on_rq.value_():
        return None
    cpu = task_cpu(task)
    queue = per_cpu(prog["runqueues"], cpu)
    waiting = list_for_each_entry("struct task_struct", queue.cfs_tasks.address_of_(), "se.group_node")
    if not any(other.value_() == task.value_() for other in waiting):
        return None
    return {"cpu": cpu, "current": task_of(cpu_curr(prog, cpu))}


def migration(trace):
    """The struct migrate_vma of a task in the middle of a migration."""
    frame = next((f for f in trace if f.name in ("migrate_vma_setup", "migrate_vma_unmap")), None)
    return (frame is not None), variable(frame, "args", "migrate") if frame is not None else None


def held_by_migration(migrate, pfns):
    """Pages of its array of sources that are among these and whose locks it holds."""
    for index in range((migrate.end.value_() - migrate.start.value_()) >> 12):
        source = migrate.src[index].value_()
        if source & MIGRATE_PFN_MIGRATE and source >> MIGRATE_PFN_SHIFT in pfns:
            yield {"index": index, "pfn": source >> MIGRATE_PFN_SHIFT}


def held_by_stack(prog, trace, folios):
    """Folios to which a frame of a stack has a pointer, each with the outermost such frame: those below it only save its
    registers. `folios` are their pfns by address."""
    frames = [frame for frame in trace if frame.name and not frame.is_inline]
    found = {}
    for frame, caller in zip(frames, frames[1:]):
        for address in range(frame.sp, caller.sp, 8):
            pfn = folios.get(prog.read_u64(address))
            if pfn is not None:
                found[pfn] = frame.name
    return [{"frame": name, "pfn": pfn} for pfn, name in found.items()]


def holders(prog, spinning):
    """Tasks that do not run and hold one of the folios that the spinners are at: it is among the sources of their migration,
    or their stack has a pointer to it and they are not themselves after it."""
    folios = {spinner["folio"]: spinner["pfn"] for spinner in spinning if spinner.get("locked")}
    pfns = {spinner["pfn"] for spinner in spinning if "pfn" in spinner}
    for task in for_each_task(prog):
        if task.mm.value_() == 0 or task.on_cpu.value_() or get_task_state(task)[0] not in "DSR":
            continue
        try:
            trace = prog.stack_trace(task)
            found = {
                "task": task_of(task),
                "state": get_task_state(task),
                "function": next((f.name for f in trace if f.name in SLEEPS), told(trace)),
                "ready": ready(prog, task),
            }
            migrates, migrate = migration(trace)
            if migrate is not None:
                found.update(
                    migrate=migrate.value_(),
                    start=migrate.start.value_(),
                    end=migrate.end.value_(),
                    held=list(held_by_migration(migrate, pfns)),
                    waits_for=waits_for(prog, trace),
                )
            elif migrates:
                NOTES.append("pid {}: the debug information has lost its struct migrate_vma".format(task.pid.value_()))
                continue
            elif any(frame.name in ACCESSES for frame in trace):
                continue
            else:
                found["held"] = held_by_stack(prog, trace, folios)
                if not found["held"]:
                    continue
            yield found
        except (drgn.FaultError, LookupError, ValueError) as error:
            note("pid {}".format(task.pid.value_()), error)


def told(trace):
    """The innermost function of a stack that is not about scheduling."""
    names = [frame.name for frame in trace if frame.name]
    return next((name for name in names if not SCHEDULING.match(name)), names[0] if names else "?")


def main():
    prog = open_guest(CONFIG)
    spinning = list(spinners(prog, cpu_registers(CONFIG["registers"])))
    json.dump({"spinners": spinning, "holders": list(holders(prog, spinning)), "notes": NOTES}, sys.stdout)


main()
