//! The whole suite against this driver, one test per case. The smallest clusters: there are more of them. The driver says
//! that it has safeguards of its own, so it is tested without the core's gate too, and with the power cut.

use format_ledger::LedgerFactory;
use iotests::Subject;

iotests::conformance!(
    Subject::new(LedgerFactory)
        .created_with("cluster_size=4k")
        .with_safeguards()
);
