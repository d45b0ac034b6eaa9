//! Compares the map with the ledger, and repairs what can be repaired. Works in memory: both tables are there.
//!
//! | map and ledger | what it is | repair |
//! | --- | --- | --- |
//! | an owner that doesn't link to the cluster | a leak, as a power cut leaves it | the cluster becomes free |
//! | a link to a cluster with another owner or none | corruption | the one that links to it becomes its owner |
//! | two links to one cluster | corruption | none: nobody knows whose data it is |

use std::collections::BTreeMap;

use block_core::image::{CheckReport, Severity};

use crate::{
    image::State,
    layout::{Entry, GuestCluster, HostCluster, Owner},
};

/// What may be changed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Repair {
    pub leaks: bool,
    pub corruptions: bool,
}

/// Checks, and repairs what `repair` says.
pub(crate) fn examine(state: &mut State, repair: Repair) -> CheckReport {
    let mut report = CheckReport {
        total_clusters: state.header.size.div_ceil(state.header.cluster_size),
        ..CheckReport::default()
    };
    let first_data = state.header.first_data();
    // Who links to which cluster.
    let mut links: BTreeMap<HostCluster, Vec<GuestCluster>> = BTreeMap::new();
    for (guest, raw) in state.map.entries().iter().enumerate() {
        if let Entry::Data(host) = Entry::decode(*raw) {
            links
                .entry(host)
                .or_default()
                .push(GuestCluster(guest as u64));
        }
    }
    report.allocated_clusters = links.len() as u64;
    let end = links
        .keys()
        .next_back()
        .map_or(first_data.0, |host| host.0 + 1);
    report.image_end_offset = Some(end * state.header.cluster_size);

    for (host, guests) in &links {
        if let [one, other, ..] = guests[..] {
            let text = format!(
                "ERROR host cluster {} belongs to guest clusters {} and {}",
                host.0, one.0, other.0
            );
            report.add(Severity::Corruption, false, text);
            continue;
        }
        let owner = state.space.owner(*host);
        if owner != Owner::Guest(guests[0]) {
            let text = format!(
                "ERROR guest cluster {} is in host cluster {}, whose owner is {owner:?}",
                guests[0].0, host.0
            );
            report.add(Severity::Corruption, repair.corruptions, text);
            if repair.corruptions {
                let owner = Owner::Guest(guests[0]).encode();
                state.space.ledger.set(host.0, owner);
            }
        }
    }

    for host in 0..state.header.ledger_entries {
        let host = HostCluster(host);
        let owner = state.space.owner(host);
        let by_format = owner == Owner::Format;
        if by_format != (host < first_data) {
            let text = format!("ERROR the owner of host cluster {} is {owner:?}", host.0);
            report.add(Severity::Corruption, repair.corruptions, text);
            if repair.corruptions {
                let right = if by_format {
                    Owner::Nobody
                } else {
                    Owner::Format
                };
                state.space.ledger.set(host.0, right.encode());
            }
        } else if let Owner::Guest(guest) = owner
            && !links.contains_key(&host)
            // On its way to be free, it has an owner and no link, as it should.
            && !state.space.is_on_its_way(host)
        {
            let text = format!(
                "Leaked host cluster {}: guest cluster {} isn't there",
                host.0, guest.0
            );
            report.add(Severity::Leak, repair.leaks, text);
            if repair.leaks {
                state.space.ledger.set(host.0, Owner::Nobody.encode());
            }
        }
    }
    if repair.leaks || repair.corruptions {
        // A repaired owner must not be handed out, and a repaired leak may be.
        state.space.find_free();
    }
    report
}
