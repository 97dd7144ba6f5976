//! The `#[kernel]` attribute of `cuda_std`.
//!
//! From one function it makes the PTX entry point, the function that the CPU executor runs, and a typed launch
//! descriptor: for `fn rms_norm(x: In<f32>, out: Out<bf16>, width: u32)` an uninhabited type `rms_norm` with
//! `rms_norm::KERNEL` and `rms_norm::launch(&x, &mut out, width)`. A launch with an argument of the wrong type does
//! not compile.

use proc_macro::TokenStream;
use proc_macro2::TokenStream as Tokens;
use quote::{format_ident, quote};
use syn::parse::{Parse, ParseStream};
use syn::{
    Error, Expr, ExprLit, FnArg, GenericArgument, Ident, ItemFn, Lit, MetaNameValue, Pat, PathArguments, Result, Token,
    Type,
};

/// Marks a kernel: `#[kernel(block = 128)]`, with the threads of a block (a multiple of 32, at most 1024).
///
/// `#[kernel(block = 128, min_blocks = 1)]` also says how many blocks a multiprocessor must hold at once: with 1, the
/// assembler may give a thread more registers than its own guess at occupancy allows. On sm_120, whose multiprocessors hold
/// fewer threads and whose assembler loads further ahead, it counts as 1.
///
/// `#[kernel(block = 128, cluster = 2)]` makes clusters of so many blocks that are neighbours in the grid's first dimension, whose
/// size is a multiple of it (compute capability 9.0 with its architecture-specific features; nothing elsewhere).
///
/// Parameters are buffers (`In<T>`, `Out<T>`, `InOut<T>`) and numbers (`u32`, `i32`, `u64`, `f32`). The function
/// returns nothing, takes no generics, and its name is the entry's name in the PTX.
#[proc_macro_attribute]
pub fn kernel(attribute: TokenStream, item: TokenStream) -> TokenStream {
    let function = syn::parse_macro_input!(item as ItemFn);
    let block = syn::parse_macro_input!(attribute as Block);
    expand(&block, &function).unwrap_or_else(Error::into_compile_error).into()
}

/// `block = N`, and perhaps `min_blocks = N` and `cluster = N`.
struct Block {
    threads: u32,
    min_blocks: Option<u32>,
    cluster: Option<u32>,
}

impl Parse for Block {
    fn parse(input: ParseStream) -> Result<Self> {
        const FORM: &str = "write #[kernel(block = THREADS)] perhaps with min_blocks = BLOCKS or cluster = BLOCKS";
        let mut threads = None;
        let (mut min_blocks, mut cluster) = (None, None);
        for setting in input.parse_terminated(MetaNameValue::parse, Token![,])? {
            let Expr::Lit(ExprLit { lit: Lit::Int(literal), .. }) = &setting.value else {
                return Err(Error::new_spanned(&setting.value, FORM));
            };
            let value: u32 = literal.base10_parse()?;
            if setting.path.is_ident("block") {
                if value == 0 || !value.is_multiple_of(32) || value > 1024 {
                    return Err(Error::new(literal.span(), "a block has a multiple of 32 threads, 32 to 1024"));
                }
                threads = Some(value);
            } else if setting.path.is_ident("min_blocks") {
                if !(1..=32).contains(&value) {
                    return Err(Error::new(literal.span(), "a multiprocessor holds 1 to 32 blocks"));
                }
                min_blocks = Some(value);
            } else if setting.path.is_ident("cluster") {
                if !(1..=8).contains(&value) {
                    return Err(Error::new(literal.span(), "a cluster has 1 to 8 blocks"));
                }
                cluster = Some(value);
            } else {
                return Err(Error::new_spanned(&setting.path, FORM));
            }
        }
        let threads = threads.ok_or_else(|| Error::new(input.span(), FORM))?;
        Ok(Self { threads, min_blocks, cluster })
    }
}

/// A parameter of the kernel.
struct Param {
    name: Ident,
    ty: Type,
    kind: Kind,
}

enum Kind {
    /// The buffer type's name and the element.
    Buffer(Ident, Box<Type>),
    /// A number.
    Scalar,
}

impl Param {
    fn parse(argument: &FnArg) -> Result<Self> {
        let FnArg::Typed(typed) = argument else {
            return Err(Error::new_spanned(argument, "a kernel has no self"));
        };
        let Pat::Ident(pattern) = &*typed.pat else {
            return Err(Error::new_spanned(&typed.pat, "name this parameter"));
        };
        let unsupported =
            || Error::new_spanned(&typed.ty, "a kernel's parameter is In<T>, Out<T>, InOut<T>, u32, i32, u64 or f32");
        let Type::Path(path) = &*typed.ty else { return Err(unsupported()) };
        let segment = path.path.segments.last().ok_or_else(unsupported)?;
        let kind = match segment.ident.to_string().as_str() {
            "In" | "Out" | "InOut" => {
                let PathArguments::AngleBracketed(arguments) = &segment.arguments else { return Err(unsupported()) };
                let Some(GenericArgument::Type(element)) = arguments.args.last() else { return Err(unsupported()) };
                Kind::Buffer(segment.ident.clone(), Box::new(element.clone()))
            }
            "u32" | "i32" | "u64" | "f32" => Kind::Scalar,
            _ => return Err(unsupported()),
        };
        Ok(Self { name: pattern.ident.clone(), ty: (*typed.ty).clone(), kind })
    }

    /// The PTX entry's parameters, and the expression that rebuilds this one from them.
    fn ptx(&self) -> (Tokens, Tokens) {
        let (name, ty) = (&self.name, &self.ty);
        match &self.kind {
            Kind::Buffer(buffer, element) => {
                let (pointer, length) = (format_ident!("{name}_pointer"), format_ident!("{name}_length"));
                (
                    quote!(#pointer: *mut #element, #length: usize),
                    quote!(::cuda_std::#buffer::<#element>::from_raw(#pointer, #length)),
                )
            }
            Kind::Scalar => (quote!(#name: #ty), quote!(#name)),
        }
    }

    /// The descriptor.
    fn desc(&self) -> Tokens {
        let (name, ty) = (self.name.to_string(), &self.ty);
        let kind = match &self.kind {
            Kind::Buffer(buffer, element) => {
                let access = match buffer.to_string().as_str() {
                    "In" => quote!(Read),
                    "Out" => quote!(Write),
                    _ => quote!(ReadWrite),
                };
                quote!(Buffer {
                    element: <#element as ::cuda_std::Element>::NAME,
                    access: ::cuda_std::launch::Access::#access,
                })
            }
            Kind::Scalar => quote!(Scalar { bytes: ::core::mem::size_of::<#ty>() }),
        };
        quote!(::cuda_std::launch::ParamDesc { name: #name, kind: ::cuda_std::launch::ParamKind::#kind })
    }

    /// The expression that takes this parameter out of argument number `index`.
    fn take_arg(&self, index: usize) -> Tokens {
        let ty = &self.ty;
        match &self.kind {
            Kind::Buffer(buffer, element) => quote!(match &arguments[#index] {
                // SAFETY: the launch's own contract.
                ::cuda_std::launch::Arg::Buffer(buffer) => unsafe {
                    ::cuda_std::#buffer::<#element>::from_arg(buffer)
                },
                ::cuda_std::launch::Arg::Scalar { .. } => unreachable!("Launch::read and write make buffers"),
            }),
            Kind::Scalar => quote!(match &arguments[#index] {
                ::cuda_std::launch::Arg::Scalar { bits, .. } => {
                    <#ty as ::cuda_std::launch::Scalar>::from_bits64(*bits)
                }
                ::cuda_std::launch::Arg::Buffer(_) => unreachable!("Launch::scalar makes numbers"),
            }),
        }
    }

    /// The launch function's parameter and the call that adds it.
    fn launch(&self) -> (Tokens, Tokens) {
        let (name, ty) = (&self.name, &self.ty);
        match &self.kind {
            Kind::Buffer(buffer, element) if buffer == "In" => (
                quote!(#name: &'a (impl ::cuda_std::launch::ReadBuffer<#element> + ?Sized)),
                quote!(.read::<#element>(#name)),
            ),
            Kind::Buffer(_, element) => (
                quote!(#name: &'a mut (impl ::cuda_std::launch::WriteBuffer<#element> + ?Sized)),
                quote!(.write::<#element>(#name)),
            ),
            Kind::Scalar => (quote!(#name: #ty), quote!(.scalar::<#ty>(#name))),
        }
    }
}

fn expand(block: &Block, function: &ItemFn) -> Result<Tokens> {
    let signature = &function.sig;
    if !signature.generics.params.is_empty() || !matches!(signature.output, syn::ReturnType::Default) {
        return Err(Error::new_spanned(signature, "a kernel has no generics and returns nothing"));
    }
    let params = signature.inputs.iter().map(Param::parse).collect::<Result<Vec<_>>>()?;
    let name = &signature.ident;
    let (name_text, threads) = (name.to_string(), block.threads);
    let block_marker = format!("// lockstep.block {threads}");
    let min_blocks = block.min_blocks.map(|blocks| {
        let marker = format!("// lockstep.min_blocks {blocks}");
        quote! {
            // SAFETY: as above.
            #[cfg(not(target_feature = "sm_120"))]
            unsafe { ::core::arch::asm!(#marker, options(nomem, nostack)) };
            // SAFETY: as above.
            #[cfg(target_feature = "sm_120")]
            unsafe { ::core::arch::asm!("// lockstep.min_blocks 1", options(nomem, nostack)) };
        }
    });

    let cluster = block.cluster.map(|blocks| {
        let marker = format!("// lockstep.cluster {blocks}");
        quote! {
            // SAFETY: as above.
            #[cfg(target_feature = "sm_90a")]
            unsafe { ::core::arch::asm!(#marker, options(nomem, nostack)) };
        }
    });

    let (ptx_params, ptx_values): (Vec<_>, Vec<_>) = params.iter().map(Param::ptx).unzip();
    let descs = params.iter().map(Param::desc);
    let from_args = params.iter().enumerate().map(|(index, param)| param.take_arg(index));
    let (launch_params, launch_calls): (Vec<_>, Vec<_>) = params.iter().map(Param::launch).unzip();

    let (docs, visibility, body) = (&function.attrs, &function.vis, &function.block);
    let inputs = &signature.inputs;
    Ok(quote! {
        #(#docs)*
        #[cfg(not(target_arch = "nvptx64"))]
        #visibility fn #name(#inputs) #body

        #(#docs)*
        #[cfg(target_arch = "nvptx64")]
        #[unsafe(no_mangle)]
        #visibility unsafe extern "ptx-kernel" fn #name(#(#ptx_params),*) {
            #[inline(always)]
            fn body(#inputs) #body
            // SAFETY: a comment, which tells the PTX post-processor the block size.
            unsafe { ::core::arch::asm!(#block_marker, options(nomem, nostack)) };
            #min_blocks
            #cluster
            // SAFETY: the launch's contract: every buffer is device memory of its length.
            unsafe { body(#(#ptx_values),*) }
        }

        #[doc = concat!("The launch descriptor of the kernel `", #name_text, "`.")]
        #[cfg(not(target_arch = "nvptx64"))]
        #[allow(non_camel_case_types, reason = "the kernel's own name")]
        #visibility enum #name {}

        #[cfg(not(target_arch = "nvptx64"))]
        impl #name {
            /// The kernel's name, block size, parameters and CPU entry.
            pub const KERNEL: &'static ::cuda_std::launch::KernelDesc = {
                unsafe fn entry(arguments: &[::cuda_std::launch::Arg]) {
                    #name(#(#from_args),*)
                }
                &::cuda_std::launch::KernelDesc {
                    name: #name_text,
                    block: #threads,
                    params: &[#(#descs),*],
                    entry,
                }
            };

            /// The kernel with these arguments.
            pub fn launch<'a>(#(#launch_params),*) -> ::cuda_std::launch::Launch<'a> {
                ::cuda_std::launch::Launch::new(Self::KERNEL) #(#launch_calls)*
            }
        }
    })
}
