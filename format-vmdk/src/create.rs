//! Makes new VMDK images: option checks, the parent's CID, and the writing of a fresh sparse or flat image.

use std::{path::Path, sync::Arc};

use block_core::{
    Error, ErrorKind, Result,
    driver::{Preallocation, Truncate},
    flags::RequestFlags,
    options::{Options, Size, Switch},
    registry::{CreateContext, CreateOption, ImplicitOpens, OpenOptions},
    request::Child,
    resolve_name,
};
use serde::Deserialize;

use crate::{
    descriptor::{CreateType, NO_PARENT, NewDescriptor},
    driver::{VmdkDriver, fresh_cid},
    layout::{DESCRIPTOR_SECTORS, NewExtent, SECTOR, unsupported_type},
};

/// What `-o` takes.
pub(crate) const OPTIONS: &[CreateOption] = &[
    CreateOption {
        name: "adapter_type",
        kind: "str",
        help: "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    },
    CreateOption {
        name: "backing_file",
        kind: "str",
        help: "File name of a base image",
    },
    CreateOption {
        name: "backing_fmt",
        kind: "str",
        help: "Must be 'vmdk' if present",
    },
    CreateOption {
        name: "compat6",
        kind: "bool (on/off)",
        help: "VMDK version 6 image",
    },
    CreateOption {
        name: "hwversion",
        kind: "str",
        help: "VMDK hardware version",
    },
    CreateOption {
        name: "preallocation",
        kind: "str",
        help: "Preallocation mode (allowed values: off, falloc, full)",
    },
    CreateOption {
        name: "size",
        kind: "size",
        help: "Virtual disk size",
    },
    CreateOption {
        name: "subformat",
        kind: "str",
        help: "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    },
    CreateOption {
        name: "toolsversion",
        kind: "str",
        help: "VMware guest tools version",
    },
    CreateOption {
        name: "zeroed_grain",
        kind: "bool (on/off)",
        help: "Enable efficient zero writes using the zeroed-grain GTE feature",
    },
];

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct VmdkCreate {
    size: Size,
    adapter_type: Option<String>,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
    compat6: Switch,
    hwversion: Option<String>,
    preallocation: Preallocation,
    subformat: Option<String>,
    toolsversion: Option<String>,
    zeroed_grain: Switch,
}

/// Options that were found to be possible together.
struct Plan {
    size: u64,
    kind: CreateType,
    adapter: String,
    hardware_version: String,
    tools_version: String,
    parent: Option<String>,
    zeroed_grains: bool,
    preallocation: Preallocation,
}

fn bad_value(name: &str, value: &str, allowed: &str) -> Error {
    Error::invalid(format!("invalid parameter value: {value}")).with_field(name, value, allowed)
}

/// Text that is put between quotes in a descriptor.
fn check_text(name: &str, value: &str) -> Result<()> {
    if value.contains(['"', '\n', '\r', '\0']) {
        return Err(bad_value(name, value, "text without quotes and newlines"));
    }
    Ok(())
}

impl VmdkCreate {
    fn plan(self) -> Result<Plan> {
        let kind = match self.subformat.as_deref() {
            None => CreateType::MonolithicSparse,
            Some(name @ ("twoGbMaxExtentSparse" | "twoGbMaxExtentFlat" | "streamOptimized")) => {
                return Err(unsupported_type(name));
            }
            Some(name) => CreateType::parse(name)
                .map_err(|_| bad_value("subformat", name, "monolithicSparse, monolithicFlat"))?,
        };
        let adapter = self.adapter_type.unwrap_or_else(|| "ide".to_owned());
        if !matches!(
            adapter.as_str(),
            "ide" | "buslogic" | "lsilogic" | "legacyESX"
        ) {
            return Err(bad_value(
                "adapter_type",
                &adapter,
                "ide, buslogic, lsilogic, legacyESX",
            ));
        }
        let hwversion = self.hwversion.filter(|version| version != "undefined");
        let hardware_version = match (self.compat6.0, hwversion) {
            (true, Some(_)) => {
                return Err(Error::invalid(
                    "compat6 cannot be enabled with hwversion set",
                ));
            }
            (true, None) => "6".to_owned(),
            (false, version) => version.unwrap_or_else(|| "4".to_owned()),
        };
        let tools_version = self.toolsversion.unwrap_or_else(|| "2147483647".to_owned());
        check_text("hwversion", &hardware_version)?;
        check_text("toolsversion", &tools_version)?;
        if kind == CreateType::MonolithicFlat {
            if self.backing_file.is_some() {
                return Err(Error::new(
                    ErrorKind::NotSupported,
                    "Flat image can't have backing file",
                ));
            }
            if self.zeroed_grain.0 {
                return Err(Error::new(
                    ErrorKind::NotSupported,
                    "Flat image can't enable zeroed grain",
                ));
            }
        }
        if let Some(format) = &self.backing_fmt
            && format != "vmdk"
        {
            return Err(
                Error::invalid("backing_file must be a vmdk image").with_field(
                    "backing_fmt",
                    format,
                    "vmdk",
                ),
            );
        }
        if let Some(name) = &self.backing_file {
            check_text("backing_file", name)?;
            if name.is_empty() || name.len() > 1022 {
                return Err(bad_value("backing_file", name, "1 to 1022 bytes"));
            }
        }
        if self.preallocation == Preallocation::Metadata {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "Unsupported preallocation mode: metadata",
            ));
        }
        let size = self
            .size
            .0
            .checked_next_multiple_of(SECTOR)
            .filter(|size| *size <= 1 << 62)
            .ok_or_else(|| Error::new(ErrorKind::TooBig, "The image size is too large for VMDK"))?;
        Ok(Plan {
            size,
            kind,
            adapter,
            hardware_version,
            tools_version,
            parent: self.backing_file,
            zeroed_grains: self.zeroed_grain.0,
            preallocation: self.preallocation,
        })
    }
}

/// Refuses options that don't make an image.
pub(crate) fn may_create(options: Options) -> Result<()> {
    options.parse::<VmdkCreate>()?.plan().map(drop)
}

/// Makes an image in `context.file`, which is fresh and empty.
pub(crate) async fn create(context: CreateContext, options: Options) -> Result<()> {
    let plan = options.parse::<VmdkCreate>()?.plan()?;
    let env = Arc::clone(context.graph().env());
    let parent_cid = match &plan.parent {
        None => NO_PARENT,
        Some(name) => read_parent_cid(&context, name).await?,
    };
    let base = Path::new(&context.filename)
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    check_text("file name", &base)?;
    let extent = match plan.kind {
        CreateType::MonolithicSparse => base,
        CreateType::MonolithicFlat => flat_name(&base),
    };
    let text = NewDescriptor {
        cid: fresh_cid(|| env.random(), 0),
        parent_cid,
        create_type: plan.kind,
        parent: plan.parent.as_deref(),
        size: plan.size,
        extent: &extent,
        hardware_version: &plan.hardware_version,
        adapter: &plan.adapter,
        tools_version: &plan.tools_version,
    }
    .text();
    match plan.kind {
        CreateType::MonolithicSparse => create_sparse(&context, &plan, text).await,
        CreateType::MonolithicFlat => create_flat(&context, &plan, &extent, text).await,
    }
}

/// `disk.vmdk` → `disk-flat.vmdk`.
fn flat_name(base: &str) -> String {
    match base.rfind('.') {
        Some(dot) => format!("{}-flat{}", &base[..dot], &base[dot..]),
        None => format!("{base}-flat"),
    }
}

async fn create_sparse(context: &CreateContext, plan: &Plan, text: String) -> Result<()> {
    let extent = NewExtent::plan(plan.size, plan.zeroed_grains)?;
    let header = &extent.header;
    let room = (DESCRIPTOR_SECTORS * SECTOR) as usize;
    if text.len() > room {
        return Err(Error::new(ErrorKind::NoSpace, "the descriptor is full"));
    }
    let mut descriptor = text.into_bytes();
    descriptor.resize(room, 0);
    let file = context.file()?;
    let how = Truncate {
        exact: true,
        preallocation: plan.preallocation,
        zero: true,
    };
    file.truncate(header.overhead * SECTOR, how).await?;
    let flags = RequestFlags::empty();
    for (sector, directory) in &extent.directories {
        let mut bytes: Vec<u8> = directory
            .iter()
            .flat_map(|table| table.to_le_bytes())
            .collect();
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        file.write(sector * SECTOR, bytes, flags).await?;
    }
    file.write(header.descriptor_offset * SECTOR, descriptor, flags)
        .await?;
    // The header last: what has none is no image.
    file.write(0, header.encode().to_vec(), flags).await?;
    file.flush().await
}

async fn create_flat(
    context: &CreateContext,
    plan: &Plan,
    extent: &str,
    text: String,
) -> Result<()> {
    let preallocation = match plan.preallocation {
        Preallocation::Full => "full",
        Preallocation::Falloc => "falloc",
        Preallocation::Metadata | Preallocation::Off => "off",
    };
    let options = Options::new()
        .with("size", plan.size)
        .with("preallocation", preallocation);
    let sibling = context.create_sibling(extent, options).await?;
    let flushed = Child::unattached(Arc::clone(&sibling)).flush().await;
    let released = context.graph().release(&sibling).await;
    flushed.and(released)?;
    let file = context.file()?;
    file.write(0, text.into_bytes(), RequestFlags::empty())
        .await?;
    file.flush().await
}

/// Opens the parent for as long as it takes to read its CID.
async fn read_parent_cid(context: &CreateContext, name: &str) -> Result<u32> {
    let name = resolve_name(&context.filename, name);
    let how = OpenOptions {
        implicit: ImplicitOpens::Permit,
        options_in_names: false,
        no_backing: true,
        no_data_file: false,
        for_check: false,
        metadata_only: false,
    };
    let options = Options::new().with("read-only", true);
    let could_not = |error: Error| error.context(format!("Could not open '{name}'"));
    let node = context
        .registry()
        .open_file(context.graph(), &name, None, options, how)
        .await
        .map_err(could_not)?;
    let cid = node
        .driver()
        .as_any()
        .downcast_ref::<VmdkDriver>()
        .map(VmdkDriver::cid);
    let format = node.driver().name();
    context.graph().release(&node).await.map_err(could_not)?;
    cid.ok_or_else(|| {
        Error::invalid(format!(
            "Invalid backing file format: {format}. Must be vmdk"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(options: &str) -> String {
        let options = Options::from_dotted(options).unwrap();
        let plan = options.parse::<VmdkCreate>().and_then(VmdkCreate::plan);
        plan.map(|_| String::new())
            .unwrap_or_else(|error| error.reason())
    }

    #[test]
    fn impossible_options_are_refused_with_qemus_words() {
        assert_eq!(
            refused("size=1M,adapter_type=foo"),
            "invalid parameter value: foo"
        );
        assert_eq!(
            refused("size=1M,subformat=foo"),
            "invalid parameter value: foo"
        );
        assert_eq!(
            refused("size=1M,compat6=on,hwversion=7"),
            "compat6 cannot be enabled with hwversion set"
        );
        assert_eq!(
            refused("size=1M,subformat=monolithicFlat,zeroed_grain=on"),
            "Flat image can't enable zeroed grain"
        );
        assert_eq!(
            refused("size=1M,subformat=monolithicFlat,backing_file=a.vmdk"),
            "Flat image can't have backing file"
        );
        assert_eq!(
            refused("size=1M,backing_file=a,backing_fmt=raw"),
            "backing_file must be a vmdk image"
        );
        assert_eq!(
            refused("size=1M,subformat=streamOptimized"),
            "Unsupported image type 'streamOptimized'"
        );
        assert_eq!(refused("size=1M,foo=1"), "Invalid parameter 'foo'");
        assert_eq!(
            refused("size=1M,toolsversion=a\"b"),
            "invalid parameter value: a\"b"
        );
        assert_eq!(
            refused("size=1M,compat6=on,zeroed_grain=on,hwversion=undefined"),
            ""
        );
    }

    #[test]
    fn flat_extents_are_named_like_qemus() {
        assert_eq!(flat_name("foo.vmdk"), "foo-flat.vmdk");
        assert_eq!(flat_name("foo"), "foo-flat");
        assert_eq!(flat_name("a.b.bar"), "a.b-flat.bar");
    }
}
