//! The macro as a third party uses it, on a driver that somebody else wrote.

use iotests::memdriver::ThirdPartyFactory;

iotests::conformance!(ThirdPartyFactory);
