//! Block status of this layer: what a range is made of, merged over clusters of one kind.

use std::sync::Arc;

use block_core::{
    error::Result,
    request::Request,
    status::{DriverStatus, StatusFlags},
};

use super::map::Run;
use crate::image::Qcow2;

/// The most runs that one answer is merged from.
const MAX_RUNS: usize = 256;

fn status_of(run: Run) -> DriverStatus {
    match run {
        Run::Data { host, len, .. } => DriverStatus::data_at(len, host.0),
        Run::Zero { len, host: None } => DriverStatus::zero(len),
        Run::Zero {
            len,
            host: Some(host),
        } => DriverStatus {
            flags: StatusFlags::ZERO | StatusFlags::OFFSET_VALID,
            len,
            file_offset: host.0,
        },
        Run::Unallocated { len, host: None } => DriverStatus::unallocated(len),
        Run::Unallocated {
            len,
            host: Some(host),
        } => DriverStatus {
            flags: StatusFlags::OFFSET_VALID,
            len,
            file_offset: host.0,
        },
        Run::Compressed { len, .. } => DriverStatus {
            flags: StatusFlags::DATA | StatusFlags::COMPRESSED,
            len,
            file_offset: 0,
        },
    }
}

impl Qcow2 {
    /// What the start of a range is made of.
    pub async fn status_guest(
        self: &Arc<Self>,
        request: &Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        let file = request.file()?;
        // Where data is can't be told without the file that it is in.
        self.data(request)?;
        let mut whole: Option<DriverStatus> = None;
        for _ in 0..MAX_RUNS {
            let done = whole.map_or(0, |status| status.len);
            if done == len {
                break;
            }
            self.make_room(request).await.ok();
            let (run, _pin) = self.locate(file, offset + done, len - done).await?;
            let mut next = status_of(run);
            if self.encryption.is_some() {
                // What is in the file isn't what the guest sees.
                next.flags -= StatusFlags::OFFSET_VALID | StatusFlags::RECURSE;
                next.file_offset = 0;
            }
            match &mut whole {
                None => whole = Some(next),
                Some(status) => {
                    let follows = !next.flags.contains(StatusFlags::OFFSET_VALID)
                        || next.file_offset == status.file_offset + status.len;
                    if next.flags != status.flags || !follows {
                        break;
                    }
                    status.len += next.len;
                }
            }
        }
        Ok(whole.unwrap_or(DriverStatus::unallocated(len)))
    }
}
