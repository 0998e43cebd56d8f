//! Reads what QEMU's monitor prints for `info registers -a`.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::CpuRegisters;

/// The general registers, but for stack and frame pointer: what a loop that stays at one address still changes.
const GENERAL: [&str; 14] = [
    "RAX=", "RBX=", "RCX=", "RDX=", "RSI=", "RDI=", "R8 =", "R9 =", "R10=", "R11=", "R12=", "R13=", "R14=",
    "R15=",
];

/// One entry a CPU that was printed whole; what is not understood is left out.
#[must_use]
pub fn parse(text: &str) -> Vec<CpuRegisters> {
    let mut blocks = text.split("CPU#");
    blocks.next();
    blocks.filter_map(block).collect()
}

fn block(text: &str) -> Option<CpuRegisters> {
    let cpu = text.split_whitespace().next()?.parse().ok()?;
    let hex = |name: &str| {
        let value = text.split_whitespace().find_map(|word| word.strip_prefix(name))?;
        u64::from_str_radix(value, 16).ok()
    };
    Some(CpuRegisters {
        cpu,
        rip: hex("RIP=")?,
        rsp: hex("RSP=")?,
        rbp: hex("RBP=")?,
        cpl: u8::try_from(hex("CPL=")?).ok()?,
        halted: hex("HLT=")? != 0,
        values: values(text),
    })
}

fn values(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    for name in GENERAL {
        let value = text.split_once(name).map(|(_, rest)| rest.split_whitespace().next());
        value.hash(&mut hasher);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 11.1 prints it, shortened.
    const TWO: &str = "\r
CPU#0\r
RAX=0000000000000000 RBX=ffffffff81a0bd40 RCX=7fffffffffffffff RDX=0000000000000037\r
RSI=0000000000000001 RDI=000000000001e0b4 RBP=ffffffff81a03e68 RSP=ffffffff81a03e60\r
RIP=ffffffff8163b8b3 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r
ES =0000 0000000000000000 00000000 00000000\r
\r
CPU#13\r
RAX=0000000000000000 RBX=ffffffff81a0bd40 RCX=7fffffffffffffff RDX=0000000000000037\r
RSI=0000000000000001 RDI=000000000001e0b4 RBP=00007ffe73e362b0 RSP=00007ffe73e36200\r
RIP=000000000044061b RFL=00000246 [---Z-P-] CPL=3 II=0 A20=1 SMM=0 HLT=0\r
";

    #[test]
    fn two_cpus() {
        let cpus = parse(TWO);
        assert_eq!(cpus.len(), 2);
        assert_ne!(
            cpus[0].values,
            parse(&TWO.replacen("RDX=0000000000000037", "RDX=0000000000000038", 1))[0].values
        );
        assert_eq!(cpus[0].values, cpus[1].values);
        let idle = CpuRegisters {
            values: cpus[0].values,
            cpu: 0,
            rip: 0xffff_ffff_8163_b8b3,
            rsp: 0xffff_ffff_81a0_3e60,
            rbp: 0xffff_ffff_81a0_3e68,
            cpl: 0,
            halted: true,
        };
        assert_eq!(cpus[0], idle);
        assert_eq!((cpus[1].cpu, cpus[1].cpl, cpus[1].halted), (13, 3, false));
    }

    #[test]
    fn half_an_answer_gives_whole_cpus_only() {
        assert_eq!(parse(&TWO[..TWO.find("CPU#13").expect("CPU 13") + 60]).len(), 1);
        assert!(parse("unknown command").is_empty());
    }
}
