//! Linear layers by cuBLASLt, restricted to algorithms that sum K in one chain.
//!
//! cuBLASLt thinks in columns: a row-major `[rows, cols]` matrix is its `[cols, rows]`. So it computes the transposed
//! output `[n, m]` as the weight, transposed from `[k, n]`, times the input `[k, m]`.
//!
//! The parts of a layer are one batch: a matrix for each segment of K, which lies between the same leading dimensions as the
//! whole, so that the segment's start is the only thing that tells it apart.
//!
//! The heuristic is asked for algorithms without workspace and without reduction, hence without split-K; what it
//! returns is read back and checked. Which of them runs may depend on `m`, because the self-test has found their bits
//! equal: the fastest by timing at the next larger rung of a ladder of `m` ([`CublasLt::choose`]), where that was timed and
//! is valid for the shape at hand, else the heuristic's first. So a new `m` costs two descriptions and a check (a few
//! microseconds) and not a question to the heuristic (50 to 100).

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtMatmulAlgo_t, cublasLtMatmulAlgoConfigAttributes_t as AlgoConfig,
    cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t as DescAttribute, cublasLtMatmulHeuristicResult_t,
    cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtMatrixLayout_t,
    cublasLtMatrixLayoutAttribute_t as LayoutAttribute, cublasStatus_t, cudaDataType,
};

use super::context::Context;
use super::events::Events;
use crate::device::choice::{LinearChoice, fastest, rung};
use crate::device::{DeviceError, OutputType};

/// `CUBLAS_OP_N` and `CUBLAS_OP_T`, which cudarc has only in its cuBLAS bindings.
const OPERATION_N: i32 = 0;
const OPERATION_T: i32 = 1;

/// How many algorithms the heuristic is asked for. Each that is timed costs the loading of its code.
const ALGORITHMS: usize = 8;

/// The library's handle and what it has been asked so far.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Shape, Arc<Plan>>>,
    /// The fastest algorithms, of shapes whose `m` is a rung.
    choices: Mutex<HashMap<Shape, cublasLtMatmulAlgo_t>>,
    context: Arc<Context>,
}

// SAFETY: the handle may be used from several threads at once, by the library's documentation.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

/// What a plan is made for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    n: usize,
    k: usize,
    m: usize,
    output: OutputType,
    /// A power of two that divides the addresses of every segment's three matrices.
    alignment: u32,
}

impl Shape {
    /// `addresses` is the union of the three addresses' bits.
    fn new(n: usize, k: usize, m: usize, output: OutputType, addresses: u64) -> Self {
        // One segment is the whole, and shares its plans.
        let (output, steps) = match output {
            OutputType::Parts(0 | 1) => (OutputType::F32, 0),
            OutputType::Parts(segments) => (output, (k / segments * 2) | (m * n * 4)),
            OutputType::F32 | OutputType::Bf16 => (output, 0),
        };
        Self { n, k, m, output, alignment: alignment(addresses | steps as u64) }
    }
}

/// One linear layer: `out[m, n] = x[m, k] * weight[n, k]` transposed.
pub(super) struct Multiply {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) m: usize,
    pub(super) output: OutputType,
    /// Addresses.
    pub(super) weight: u64,
    pub(super) x: u64,
    pub(super) out: u64,
}

/// The library's descriptions of a shape, and the algorithms that keep the contract.
struct Plan {
    operation: Descriptor<cublasLtMatmulDesc_t>,
    weight: Descriptor<cublasLtMatrixLayout_t>,
    x: Descriptor<cublasLtMatrixLayout_t>,
    out: Descriptor<cublasLtMatrixLayout_t>,
    /// The one that computes it. `None` where there is none.
    chosen: Option<cublasLtMatmulAlgo_t>,
    /// All that the heuristic offers, once it was asked.
    offered: OnceLock<Vec<cublasLtMatmulAlgo_t>>,
}

// SAFETY: the descriptors are host memory that is only read after they are made.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

type Destroy<H> = unsafe fn(H) -> cublasStatus_t;

/// A handle of the library with the function that destroys it.
struct Descriptor<H> {
    handle: Option<(H, Destroy<H>)>,
}

impl<H> Default for Descriptor<H> {
    fn default() -> Self {
        Self { handle: None }
    }
}

impl<H: Copy> Descriptor<*mut H> {
    fn get(&self) -> *mut H {
        self.handle.map_or(std::ptr::null_mut(), |(handle, _)| handle)
    }
}

impl<H> Drop for Descriptor<H> {
    fn drop(&mut self) {
        if let Some((handle, destroy)) = self.handle.take() {
            // SAFETY: created by the library, destroyed once.
            unsafe {
                let _ = destroy(handle);
            }
        }
    }
}

fn checked(status: cublasStatus_t, what: &str) -> Result<(), DeviceError> {
    if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        Ok(())
    } else {
        Err(DeviceError::KernelLaunchFailed(format!("cuBLASLt, {what}: {status:?}")))
    }
}

impl CublasLt {
    /// `None` when the library is not installed. cudarc panics then, so this asks first.
    pub(super) fn new(context: &Arc<Context>) -> Result<Option<Self>, DeviceError> {
        // SAFETY: loads a library and runs its initialisers, which do nothing that we depend on.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle; destroyed in `drop`.
        checked(unsafe { sys::cublasLtCreate(&raw mut handle) }, "no handle")?;
        Ok(Some(Self { handle, plans: Mutex::default(), choices: Mutex::default(), context: Arc::clone(context) }))
    }

    pub(super) fn description(&self) -> String {
        // SAFETY: no arguments.
        format!("cuBLASLt {}", unsafe { sys::cublasLtGetVersion() })
    }

    /// Computes one linear layer, with one of the offered algorithms where `algorithm` says so.
    ///
    /// # Safety
    /// The addresses are live memory of the device for the shape's elements, and nobody else uses the output.
    pub(super) unsafe fn multiply(&self, multiply: &Multiply, algorithm: Option<usize>) -> Result<(), DeviceError> {
        self.context.enter()?;
        let Multiply { n, k, m, .. } = *multiply;
        let plan = self.plan(multiply.shape())?;
        let chosen = match algorithm {
            None => plan.chosen.as_ref().ok_or_else(|| {
                DeviceError::KernelLaunchFailed(format!(
                    "cuBLASLt has no algorithm for {n} x {k} with {m} rows that sums in one chain; use the kernel \
                     backend"
                ))
            })?,
            Some(index) => {
                let offered = self.offered(&plan, multiply.shape())?;
                offered.get(index).ok_or_else(|| {
                    let count = offered.len();
                    DeviceError::InvalidParameter(format!("there are {count} algorithms for this shape, not {index}"))
                })?
            }
        };
        // SAFETY: as the caller says.
        unsafe { self.run(multiply, &plan, chosen) }
    }

    /// # Safety
    /// As for [`multiply`](Self::multiply); the plan is the shape's.
    unsafe fn run(
        &self,
        multiply: &Multiply,
        plan: &Plan,
        algorithm: &cublasLtMatmulAlgo_t,
    ) -> Result<(), DeviceError> {
        let Multiply { n, k, m, weight, x, out, .. } = *multiply;
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: the layouts describe the memory that the contract promises; scalars are read from the host before
        // the call returns; an algorithm without workspace takes none.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.operation.get(),
                (&raw const one).cast(),
                pointer(weight),
                plan.weight.get(),
                pointer(x),
                plan.x.get(),
                (&raw const zero).cast(),
                pointer(out),
                plan.out.get(),
                pointer(out),
                plan.out.get(),
                algorithm,
                std::ptr::null_mut(),
                0,
                self.context.stream().cast(),
            )
        };
        // First of all, so that no text is made for a call that succeeds.
        if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            return Ok(());
        }
        let result = checked(status, &format!("{n} x {k} with {m} rows"));
        if let Err(error) = &result
            && matches!(
                status,
                cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED | cublasStatus_t::CUBLAS_STATUS_INTERNAL_ERROR
            )
        {
            self.context.fail(error);
        }
        result
    }

    /// The algorithms for a shape at addresses like those of whole buffers.
    pub(super) fn algorithms(
        &self,
        n: usize,
        k: usize,
        m: usize,
        output: OutputType,
    ) -> Result<Vec<String>, DeviceError> {
        if n == 0 || k == 0 || m == 0 {
            return Err(DeviceError::InvalidParameter(format!("a linear layer of {n} x {k} with {m} rows is empty")));
        }
        if let OutputType::Parts(segments) = output
            && (segments == 0 || !k.is_multiple_of(segments))
        {
            return Err(DeviceError::InvalidParameter(format!("K = {k} cannot be cut in {segments} segments")));
        }
        self.context.enter()?;
        let shape = Shape::new(n, k, m, output, 256);
        let plan = self.plan(shape)?;
        Ok(self.offered(&plan, shape)?.iter().map(describe).collect())
    }

    /// Times the algorithms on layers of one shape, one after the other, so that weights come from memory as they do in a
    /// step, and keeps the fastest for all layers whose rung is this `m`. `None` where there is nothing to choose, or no clock.
    ///
    /// # Safety
    /// As for [`multiply`](Self::multiply), for each of them.
    pub(super) unsafe fn choose(&self, layers: &[Multiply]) -> Result<Option<LinearChoice>, DeviceError> {
        self.context.enter()?;
        let Some(shape) = layers.first().map(Multiply::shape) else { return Ok(None) };
        if layers.iter().any(|layer| layer.shape() != shape) || rung(shape.m) != shape.m {
            let text = format!("layers of {} rows are not of one shape whose rows are a rung", shape.m);
            return Err(DeviceError::InvalidParameter(text));
        }
        let Ok(mut events) = Events::new(&self.context) else { return Ok(None) };
        let plan = self.plan(shape)?;
        let offered = self.offered(&plan, shape)?;
        let mut turns = layers.iter().cycle();
        let found = fastest(offered.len(), |candidate, launches| {
            events.start()?;
            for layer in turns.by_ref().take(launches) {
                // SAFETY: as the caller says; the plan is the shape's, which all layers have.
                match unsafe { self.run(layer, &plan, &offered[candidate]) } {
                    Err(error) if self.context.failure().is_some() => return Err(error),
                    // Offered, and yet refused: never the fastest.
                    Err(_) => return Ok(f64::INFINITY),
                    Ok(()) => {}
                }
            }
            events.stop()?;
            Ok(events.elapsed()?.as_secs_f64() * 1e6 / launches as f64)
        })?;
        let Some(found) = found else { return Ok(None) };
        let chosen = offered[found.index];
        locked(&self.choices).insert(shape, chosen);
        locked(&self.plans).clear();
        Ok(Some(LinearChoice {
            n: shape.n,
            k: shape.k,
            rows: shape.m,
            offered: offered.len(),
            index: found.index,
            first_us: found.first_us,
            chosen_us: found.us,
            algorithm: describe(&chosen),
        }))
    }

    fn plan(&self, shape: Shape) -> Result<Arc<Plan>, DeviceError> {
        if let Some(plan) = locked(&self.plans).get(&shape) {
            return Ok(Arc::clone(plan));
        }
        let mut plan = self.describe_shape(shape)?;
        let choice = locked(&self.choices).get(&Shape { m: rung(shape.m), ..shape }).copied();
        plan.chosen = match choice.filter(|choice| self.is_valid(&plan, choice)) {
            Some(choice) => Some(choice),
            None => self.offered(&plan, shape)?.first().copied(),
        };
        let plan = Arc::new(plan);
        locked(&self.plans).insert(shape, Arc::clone(&plan));
        Ok(plan)
    }

    /// A plan without an algorithm.
    fn describe_shape(&self, shape: Shape) -> Result<Plan, DeviceError> {
        let Shape { n, k, m, output, .. } = shape;
        let (output_type, segments) = match output {
            OutputType::F32 => (cudaDataType::CUDA_R_32F, 1),
            OutputType::Bf16 => (cudaDataType::CUDA_R_16BF, 1),
            OutputType::Parts(segments) => (cudaDataType::CUDA_R_32F, segments),
        };
        let part = k / segments;
        let operand = cudaDataType::CUDA_R_16BF;
        Ok(Plan {
            operation: operation()?,
            weight: layout(&Matrices { ty: operand, rows: part, cols: n, leading: k, count: segments, step: part })?,
            x: layout(&Matrices { ty: operand, rows: part, cols: m, leading: k, count: segments, step: part })?,
            out: layout(&Matrices { ty: output_type, rows: n, cols: m, leading: n, count: segments, step: m * n })?,
            chosen: None,
            offered: OnceLock::new(),
        })
    }

    /// Whether an algorithm that was offered for other rows computes these, in one chain.
    fn is_valid(&self, plan: &Plan, algorithm: &cublasLtMatmulAlgo_t) -> bool {
        let mut result = std::mem::MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: the descriptors are alive; writes one result.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                plan.operation.get(),
                plan.weight.get(),
                plan.x.get(),
                plan.out.get(),
                plan.out.get(),
                algorithm,
                result.as_mut_ptr(),
            )
        };
        if status != cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            return false;
        }
        // SAFETY: the library has written it; the memory was zeroed before, a value of every field.
        let result = unsafe { result.assume_init_ref() };
        result.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && result.workspaceSize == 0
            && sums_in_one_chain(algorithm)
    }

    /// What the heuristic offers for a plan's shape under the contract, the best by its own expectation first.
    fn offered<'a>(&self, plan: &'a Plan, shape: Shape) -> Result<&'a [cublasLtMatmulAlgo_t], DeviceError> {
        if let Some(offered) = plan.offered.get() {
            return Ok(offered);
        }
        let offered = self.ask(plan, shape)?;
        Ok(plan.offered.get_or_init(|| offered))
    }

    fn ask(&self, plan: &Plan, shape: Shape) -> Result<Vec<cublasLtMatmulAlgo_t>, DeviceError> {
        let Shape { n, k, m, alignment, .. } = shape;
        let preference = preference(alignment)?;
        let mut results: [std::mem::MaybeUninit<cublasLtMatmulHeuristicResult_t>; ALGORITHMS] =
            [const { std::mem::MaybeUninit::zeroed() }; ALGORITHMS];
        let mut count = 0;
        // SAFETY: the descriptors are alive; at most as many results are written as there is room for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.operation.get(),
                plan.weight.get(),
                plan.x.get(),
                plan.out.get(),
                plan.out.get(),
                preference.get(),
                ALGORITHMS as i32,
                results.as_mut_ptr().cast(),
                &raw mut count,
            )
        };
        let mut offered = Vec::new();
        if status == cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            // No algorithm: an empty answer, so that the question is asked once.
            return Ok(offered);
        }
        checked(status, &format!("algorithms for {n} x {k} with {m} rows"))?;
        for result in &results[..usize::try_from(count).unwrap_or(0).min(ALGORITHMS)] {
            // SAFETY: the library has written `count` results; the memory was zeroed before, a value of every field.
            let result = unsafe { result.assume_init_ref() };
            if result.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && result.workspaceSize == 0
                && sums_in_one_chain(&result.algo)
            {
                offered.push(result.algo);
            }
        }
        Ok(offered)
    }
}

impl Multiply {
    fn shape(&self) -> Shape {
        let Self { n, k, m, output, weight, x, out } = *self;
        Shape::new(n, k, m, output, weight | x | out)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        let _ = self.context.make_current();
        // SAFETY: created in `new`, destroyed once, after its descriptors.
        unsafe {
            let _ = sys::cublasLtDestroy(self.handle);
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

/// The largest of 256, 16 and 2 that divides the addresses of which `bits` is the union. The library takes 256 for
/// granted unless told otherwise; vector accesses need 16; 2 is an element.
fn alignment(bits: u64) -> u32 {
    match bits.trailing_zeros() {
        8.. => 256,
        4..=7 => 16,
        _ => 2,
    }
}

/// f32 sums of the transposed first operand times the second.
fn operation() -> Result<Descriptor<cublasLtMatmulDesc_t>, DeviceError> {
    let mut handle = std::ptr::null_mut();
    // SAFETY: writes one handle.
    let status = unsafe {
        sys::cublasLtMatmulDescCreate(
            &raw mut handle,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cudaDataType::CUDA_R_32F,
        )
    };
    checked(status, "a description")?;
    let descriptor = Descriptor { handle: Some((handle, sys::cublasLtMatmulDescDestroy as _)) };
    for (attribute, value) in [
        (DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, OPERATION_T),
        (DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, OPERATION_N),
    ] {
        // SAFETY: reads one int.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(handle, attribute, (&raw const value).cast(), size_of_val(&value))
        };
        checked(status, "a transposition")?;
    }
    Ok(descriptor)
}

/// Matrices in columns, one for each segment.
struct Matrices {
    ty: cudaDataType,
    rows: usize,
    cols: usize,
    /// Elements from a column to the next.
    leading: usize,
    count: usize,
    /// Elements from a matrix to the next.
    step: usize,
}

fn layout(matrices: &Matrices) -> Result<Descriptor<cublasLtMatrixLayout_t>, DeviceError> {
    let Matrices { ty, rows, cols, leading, count, step } = *matrices;
    let mut handle = std::ptr::null_mut();
    // SAFETY: writes one handle.
    let status =
        unsafe { sys::cublasLtMatrixLayoutCreate(&raw mut handle, ty, rows as u64, cols as u64, leading as i64) };
    checked(status, "a layout")?;
    let descriptor = Descriptor { handle: Some((handle, sys::cublasLtMatrixLayoutDestroy as _)) };
    if count > 1 {
        let (count, step) = (count as i32, step as i64);
        // SAFETY: reads 4 bytes.
        let status = unsafe {
            sys::cublasLtMatrixLayoutSetAttribute(
                handle,
                LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                (&raw const count).cast(),
                size_of_val(&count),
            )
        };
        checked(status, "a batch")?;
        // SAFETY: reads 8 bytes.
        let status = unsafe {
            sys::cublasLtMatrixLayoutSetAttribute(
                handle,
                LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                (&raw const step).cast(),
                size_of_val(&step),
            )
        };
        checked(status, "a batch's steps")?;
    }
    Ok(descriptor)
}

/// No workspace, no reduction, and no more alignment than there is.
fn preference(alignment: u32) -> Result<Descriptor<sys::cublasLtMatmulPreference_t>, DeviceError> {
    let mut handle = std::ptr::null_mut();
    // SAFETY: writes one handle.
    checked(unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut handle) }, "a preference")?;
    let descriptor = Descriptor { handle: Some((handle, sys::cublasLtMatmulPreferenceDestroy as _)) };
    let workspace_bytes = 0_u64;
    // SAFETY: reads 8 bytes.
    let status = unsafe {
        sys::cublasLtMatmulPreferenceSetAttribute(
            handle,
            Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace_bytes).cast(),
            size_of_val(&workspace_bytes),
        )
    };
    checked(status, "no workspace")?;
    let no_reduction = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
    for (attribute, value) in [
        (Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, no_reduction),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment),
    ] {
        // SAFETY: reads 4 bytes.
        let status = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(handle, attribute, (&raw const value).cast(), size_of_val(&value))
        };
        checked(status, &format!("{attribute:?}"))?;
    }
    Ok(descriptor)
}

/// One word of an algorithm's configuration; `None` when it has no such word.
fn config(algorithm: &cublasLtMatmulAlgo_t, attribute: AlgoConfig) -> Option<u32> {
    let (mut value, mut written) = (0_u32, 0_usize);
    // SAFETY: writes at most 4 bytes and one size.
    let status = unsafe {
        sys::cublasLtMatmulAlgoConfigGetAttribute(
            algorithm,
            attribute,
            (&raw mut value).cast(),
            size_of_val(&value),
            &raw mut written,
        )
    };
    (status == cublasStatus_t::CUBLAS_STATUS_SUCCESS).then_some(value)
}

fn sums_in_one_chain(algorithm: &cublasLtMatmulAlgo_t) -> bool {
    config(algorithm, AlgoConfig::CUBLASLT_ALGO_CONFIG_SPLITK_NUM) == Some(1)
        && config(algorithm, AlgoConfig::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) == Some(0)
}

fn describe(algorithm: &cublasLtMatmulAlgo_t) -> String {
    let words = [
        ("algorithm", AlgoConfig::CUBLASLT_ALGO_CONFIG_ID),
        ("tile", AlgoConfig::CUBLASLT_ALGO_CONFIG_TILE_ID),
        ("stages", AlgoConfig::CUBLASLT_ALGO_CONFIG_STAGES_ID),
        ("split-K", AlgoConfig::CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
        ("reduction", AlgoConfig::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME),
        ("swizzle", AlgoConfig::CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING),
        ("custom", AlgoConfig::CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION),
        ("cluster", AlgoConfig::CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID),
    ];
    // Some words are 16 bits wide and refuse to be read as 32: they are left out.
    let words = words.iter().filter_map(|&(name, attribute)| Some(format!("{name} {}", config(algorithm, attribute)?)));
    words.collect::<Vec<_>>().join(", ")
}
