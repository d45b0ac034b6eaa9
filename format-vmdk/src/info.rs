//! What `info` shows of a VMDK image: the keys that qemu-img prints, in its order. Opens and reads nothing.

use block_core::{driver::ChildRole, image::ImageInfo, request::Request};
use serde_json::{Map, Value, json};

use crate::driver::{FLAT_EDGE, Layout, VmdkDriver};

pub(crate) fn info(driver: &VmdkDriver, request: &Request) -> ImageInfo {
    let name = |edge: Option<&block_core::request::Child>| {
        edge.and_then(block_core::request::Child::filename)
            .unwrap_or_default()
    };
    let mut extent = Map::new();
    let mut cluster_size = None;
    match &driver.layout {
        Layout::Sparse(sparse) => {
            let grain = sparse.geometry.grain_bytes;
            cluster_size = Some(grain);
            extent.insert("virtual-size".into(), json!(sparse.geometry.length));
            extent.insert(
                "filename".into(),
                json!(name(request.child(ChildRole::File))),
            );
            extent.insert("cluster-size".into(), json!(grain));
            extent.insert("format".into(), json!(""));
        }
        Layout::Flat(flat) => {
            let edge = request.edges().named(FLAT_EDGE).map(|edge| &edge.child);
            extent.insert("virtual-size".into(), json!(flat.length));
            extent.insert("filename".into(), json!(name(edge)));
            extent.insert("format".into(), json!("FLAT"));
        }
    }
    let mut data = Map::new();
    data.insert("cid".into(), json!(driver.cid()));
    data.insert("parent-cid".into(), json!(driver.parent_cid()));
    data.insert("create-type".into(), json!(driver.create_type().name()));
    data.insert("extents".into(), json!([extent]));
    ImageInfo {
        cluster_size,
        backing_filename: driver.parent_hint().map(str::to_owned),
        snapshots: Vec::new(),
        backing_format: driver.parent_hint().map(|_| "vmdk".to_owned()),
        format_specific: Some(("vmdk".to_owned(), Value::Object(data))),
        ..ImageInfo::default()
    }
}
