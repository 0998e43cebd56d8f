// SPDX-License-Identifier: GPL-2.0

//! Copying the ioctl structures of [`crate::abi::uapi`] from and to user space.
//!
//! This is the only place that vouches for their layout.

use kernel::{
    prelude::*,
    transmute::{
        AsBytes,
        FromBytes, //
    },
    uaccess::UserSlice, //
};

use crate::abi::uapi;

macro_rules! plain {
    ($($name:ident),* $(,)?) => {
        $(
            // SAFETY: the structure consists of `u64` and `u32` only, for which every bit pattern is valid.
            unsafe impl FromBytes for Plain<uapi::$name> {}
            // SAFETY: the structure is `repr(C)`, consists of `u64` and `u32` only and has no padding (`abi` asserts
            // its size), so that all of its bytes are initialised.
            unsafe impl AsBytes for Plain<uapi::$name> {}
        )*
    };
}

/// An ioctl structure as it crosses the boundary to user space.
#[repr(transparent)]
struct Plain<T>(T);

plain!(
    DmirrorCmd,
    Migrate,
    Access,
    Stats,
    Submit,
    Wait,
    Policy,
    Evict,
    PeerMigrate,
    Hold,
    Refuse
);

/// An ioctl structure of this driver.
pub(crate) trait Command: Sized {
    /// Copies the structure at the user address `arg` in.
    ///
    /// # Errors
    ///
    /// `EFAULT`.
    fn read(arg: usize) -> Result<Self>;

    /// Copies the structure out to the user address `arg`.
    ///
    /// # Errors
    ///
    /// `EFAULT`.
    fn write(self, arg: usize) -> Result;
}

impl<T> Command for T
where
    Plain<T>: FromBytes + AsBytes,
{
    fn read(arg: usize) -> Result<Self> {
        let user = UserSlice::new(UserPtr::from_addr(arg), size_of::<Self>());

        Ok(user.reader().read::<Plain<Self>>()?.0)
    }

    fn write(self, arg: usize) -> Result {
        let user = UserSlice::new(UserPtr::from_addr(arg), size_of::<Self>());

        user.writer().write(&Plain(self))
    }
}
