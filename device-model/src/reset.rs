//! What each kind of reset clears, written once.
//!
//! | reset | by | channels | their held work | pending interrupts | config space | eventfds, DMA map | VRAM |
//! |---|---|---|---|---|---|---|---|
//! | channel | `CH_CONTROL_RESET` | that one | ends `Aborted` | kept | kept | kept | kept |
//! | device | `CONTROL_RESET` | all | ends `Aborted` | kept | kept | kept | kept |
//! | function | FLR, the VMM's reset | all | dropped | cleared | cleared | kept | kept |
//! | power | the VMM is gone | all | dropped | cleared | cleared | dropped | zeroed |
//!
//! All but the first also unbind every address space, forget the TLB, and turn the fault buffer off.
//!
//! The chaos plan and the statistics belong to the bench and outlive every reset.

/// What happens to descriptors that a channel holds when it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// They complete as `Aborted`: their fences are written and their interrupts raised.
    Abort,
    /// They vanish. The memory of their fences may have another owner by now.
    Drop,
}

/// The resets of a whole GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// By the driver, through `CONTROL`.
    Device,
    /// Of the PCI function: FLR, or a reset that the VMM forwards.
    Function,
    /// By the disappearance of the VMM.
    Power,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    /// What becomes of the work of every channel.
    pub held: Held,
    /// Whether pending interrupts and the config space return to their initial values.
    pub function: bool,
    /// Whether eventfds, DMA map and VRAM contents go.
    pub connection: bool,
}

impl Reset {
    /// What this reset clears.
    pub const fn scope(self) -> Scope {
        match self {
            Self::Device => Scope { held: Held::Abort, function: false, connection: false },
            Self::Function => Scope { held: Held::Drop, function: true, connection: false },
            Self::Power => Scope { held: Held::Drop, function: true, connection: true },
        }
    }
}
