//! The macro as a third party uses it, on a driver that somebody else wrote.

use iotests::{Subject, memdriver::ThirdPartyFactory};

iotests::conformance!(Subject::new(ThirdPartyFactory).without_crash_safety());
