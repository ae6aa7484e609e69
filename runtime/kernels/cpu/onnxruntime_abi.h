/* The part of ONNX Runtime's C API that zeroskip calls, so that no ONNX Runtime header is needed.

   The API is a table of functions that only ever grows at its end: a function keeps its place in
   it, and a runtime hands out the table for any version it knows. Names, types and places are those
   of onnxruntime_c_api.h, so code written against this header compiles unchanged against that one
   (define ZS_OFFICIAL_ONNXRUNTIME_HEADER, or include it in place of this). What is not used here is
   left out as `reserved`. Everything below is in version 17, ONNX Runtime 1.17. */
#ifndef ZEROSKIP_ONNXRUNTIME_ABI_H
#define ZEROSKIP_ONNXRUNTIME_ABI_H

#ifdef ZS_OFFICIAL_ONNXRUNTIME_HEADER
#include "onnxruntime_c_api.h"
#else

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define ORT_API_CALL __stdcall
#define ORT_EXPORT
#define ORTCHAR_T wchar_t
#else
#define ORT_API_CALL
#define ORT_EXPORT __attribute__((visibility("default")))
#define ORTCHAR_T char
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16
} ONNXTensorElementDataType;

typedef enum OrtLoggingLevel {
  ORT_LOGGING_LEVEL_VERBOSE = 0,
  ORT_LOGGING_LEVEL_INFO = 1,
  ORT_LOGGING_LEVEL_WARNING = 2,
  ORT_LOGGING_LEVEL_ERROR = 3,
  ORT_LOGGING_LEVEL_FATAL = 4
} OrtLoggingLevel;

typedef enum OrtErrorCode { ORT_OK = 0, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 } OrtErrorCode;

typedef enum OrtAllocatorType {
  OrtInvalidAllocator = -1,
  OrtDeviceAllocator = 0,
  OrtArenaAllocator = 1
} OrtAllocatorType;

typedef enum OrtMemType { OrtMemTypeDefault = 0 } OrtMemType;

typedef enum OrtCustomOpInputOutputCharacteristic {
  INPUT_OUTPUT_REQUIRED = 0,
  INPUT_OUTPUT_OPTIONAL = 1,
  INPUT_OUTPUT_VARIADIC = 2
} OrtCustomOpInputOutputCharacteristic;

typedef struct OrtAllocator OrtAllocator;
typedef struct OrtApi OrtApi;
typedef struct OrtCustomOp OrtCustomOp;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtEnv OrtEnv;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtStatus OrtStatus;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtValue OrtValue;
typedef OrtStatus* OrtStatusPtr; /* null: success */

typedef struct OrtApiBase {
  const OrtApi*(ORT_API_CALL* GetApi)(uint32_t version); /* null: not offered */
  const char*(ORT_API_CALL* GetVersionString)(void);
} OrtApiBase;

ORT_EXPORT const OrtApiBase* ORT_API_CALL OrtGetApiBase(void);

/* Functions that are not used: the number behind `reserved` is the place of the first of them. */
typedef void (*OrtReserved)(void);

struct OrtApi {
  OrtStatus*(ORT_API_CALL* CreateStatus)(OrtErrorCode code, const char* message);
  OrtReserved reserved1[1];
  const char*(ORT_API_CALL* GetErrorMessage)(const OrtStatus* status);
  OrtStatusPtr(ORT_API_CALL* CreateEnv)(OrtLoggingLevel level, const char* log_id, OrtEnv** out);
  OrtReserved reserved4[3];
  OrtStatusPtr(ORT_API_CALL* CreateSession)(const OrtEnv* env, const ORTCHAR_T* model_path,
                                            const OrtSessionOptions* options, OrtSession** out);
  OrtReserved reserved8[1];
  OrtStatusPtr(ORT_API_CALL* Run)(OrtSession* session, const OrtRunOptions* run_options,
                                  const char* const* input_names, const OrtValue* const* inputs,
                                  size_t input_count, const char* const* output_names,
                                  size_t output_count, OrtValue** outputs);
  OrtStatusPtr(ORT_API_CALL* CreateSessionOptions)(OrtSessionOptions** options);
  OrtReserved reserved11[13];
  OrtStatusPtr(ORT_API_CALL* SetIntraOpNumThreads)(OrtSessionOptions* options, int threads);
  OrtReserved reserved25[1];
  OrtStatusPtr(ORT_API_CALL* CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);
  OrtStatusPtr(ORT_API_CALL* CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
  OrtStatusPtr(ORT_API_CALL* AddCustomOpDomain)(OrtSessionOptions* options,
                                                OrtCustomOpDomain* domain);
  OrtReserved reserved29[20];
  OrtStatusPtr(ORT_API_CALL* CreateTensorWithDataAsOrtValue)(
      const OrtMemoryInfo* memory, void* data, size_t data_bytes, const int64_t* shape, size_t rank,
      ONNXTensorElementDataType type, OrtValue** out);
  OrtReserved reserved50[1];
  OrtStatusPtr(ORT_API_CALL* GetTensorMutableData)(OrtValue* value, void** out);
  OrtReserved reserved52[8];
  OrtStatusPtr(ORT_API_CALL* GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info,
                                                   ONNXTensorElementDataType* out);
  OrtStatusPtr(ORT_API_CALL* GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info,
                                                 size_t* out);
  OrtStatusPtr(ORT_API_CALL* GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* values,
                                            size_t count);
  OrtReserved reserved63[2];
  OrtStatusPtr(ORT_API_CALL* GetTensorTypeAndShape)(const OrtValue* value,
                                                    OrtTensorTypeAndShapeInfo** out);
  OrtReserved reserved66[3];
  OrtStatusPtr(ORT_API_CALL* CreateCpuMemoryInfo)(OrtAllocatorType type, OrtMemType memory_type,
                                                  OrtMemoryInfo** out);
  OrtReserved reserved70[5];
  OrtStatusPtr(ORT_API_CALL* AllocatorAlloc)(OrtAllocator* allocator, size_t size, void** out);
  OrtStatusPtr(ORT_API_CALL* AllocatorFree)(OrtAllocator* allocator, void* memory);
  OrtReserved reserved77[9];
  OrtStatusPtr(ORT_API_CALL* KernelInfoGetAttribute_int64)(const OrtKernelInfo* info,
                                                           const char* name, int64_t* out);
  OrtReserved reserved87[1];
  OrtStatusPtr(ORT_API_CALL* KernelContext_GetInputCount)(const OrtKernelContext* context,
                                                          size_t* out);
  OrtReserved reserved89[1];
  OrtStatusPtr(ORT_API_CALL* KernelContext_GetInput)(const OrtKernelContext* context, size_t index,
                                                     const OrtValue** out);
  OrtStatusPtr(ORT_API_CALL* KernelContext_GetOutput)(OrtKernelContext* context, size_t index,
                                                      const int64_t* shape, size_t rank,
                                                      OrtValue** out);
  void(ORT_API_CALL* ReleaseEnv)(OrtEnv* input);
  void(ORT_API_CALL* ReleaseStatus)(OrtStatus* input);
  void(ORT_API_CALL* ReleaseMemoryInfo)(OrtMemoryInfo* input);
  void(ORT_API_CALL* ReleaseSession)(OrtSession* input);
  void(ORT_API_CALL* ReleaseValue)(OrtValue* input);
  OrtReserved reserved97[2];
  void(ORT_API_CALL* ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* input);
  void(ORT_API_CALL* ReleaseSessionOptions)(OrtSessionOptions* input);
  void(ORT_API_CALL* ReleaseCustomOpDomain)(OrtCustomOpDomain* input);
  OrtReserved reserved102[30];
  void(ORT_API_CALL* ReleaseAllocator)(OrtAllocator* input);
  OrtReserved reserved133[95];
  OrtStatusPtr(ORT_API_CALL* RegisterCustomOpsLibrary_V2)(OrtSessionOptions* options,
                                                          const ORTCHAR_T* library_name);
  OrtReserved reserved229[1];
  OrtStatusPtr(ORT_API_CALL* KernelInfo_GetInputCount)(const OrtKernelInfo* info, size_t* out);
  OrtReserved reserved231[1];
  OrtStatusPtr(ORT_API_CALL* KernelInfo_GetInputName)(const OrtKernelInfo* info, size_t index,
                                                      char* out, size_t* size);
  OrtReserved reserved233[11];
  OrtStatusPtr(ORT_API_CALL* KernelInfo_GetNodeName)(const OrtKernelInfo* info, char* out,
                                                     size_t* size);
  OrtReserved reserved245[4];
  OrtStatusPtr(ORT_API_CALL* KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info,
                                                                size_t index, int* is_constant,
                                                                const OrtValue** out);
  OrtReserved reserved250[3];
  OrtStatusPtr(ORT_API_CALL* KernelContext_GetAllocator)(const OrtKernelContext* context,
                                                         const OrtMemoryInfo* memory,
                                                         OrtAllocator** out);
  OrtReserved reserved254[20];
  OrtStatusPtr(ORT_API_CALL* KernelContext_ParallelFor)(const OrtKernelContext* context,
                                                        void (*task)(void*, size_t), size_t total,
                                                        size_t batches, void* user_data);
  /* The table goes on; nothing below here is read. */
};

/* What an operator is to the runtime. Callbacks that a version does not know are not read. */
struct OrtCustomOp {
  uint32_t version;
  void*(ORT_API_CALL* CreateKernel)(const OrtCustomOp* op, const OrtApi* api,
                                    const OrtKernelInfo* info);
  const char*(ORT_API_CALL* GetName)(const OrtCustomOp* op);
  const char*(ORT_API_CALL* GetExecutionProviderType)(const OrtCustomOp* op);
  ONNXTensorElementDataType(ORT_API_CALL* GetInputType)(const OrtCustomOp* op, size_t index);
  size_t(ORT_API_CALL* GetInputTypeCount)(const OrtCustomOp* op);
  ONNXTensorElementDataType(ORT_API_CALL* GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t(ORT_API_CALL* GetOutputTypeCount)(const OrtCustomOp* op);
  void(ORT_API_CALL* KernelCompute)(void* kernel, OrtKernelContext* context);
  void(ORT_API_CALL* KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic(ORT_API_CALL* GetInputCharacteristic)(const OrtCustomOp* op,
                                                                             size_t index);
  OrtCustomOpInputOutputCharacteristic(ORT_API_CALL* GetOutputCharacteristic)(const OrtCustomOp* op,
                                                                              size_t index);
  OrtMemType(ORT_API_CALL* GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int(ORT_API_CALL* GetVariadicInputMinArity)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatusPtr(ORT_API_CALL* CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api,
                                             const OrtKernelInfo* info, void** kernel);
  OrtStatusPtr(ORT_API_CALL* KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatusPtr(ORT_API_CALL* InferOutputShapeFn)(const OrtCustomOp* op,
                                                 OrtShapeInferContext* context);
  int(ORT_API_CALL* GetStartVersion)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetEndVersion)(const OrtCustomOp* op);
  OrtReserved reserved22[4]; /* read from version 18 on */
};

#ifdef __cplusplus
}
#endif
#endif /* ZS_OFFICIAL_ONNXRUNTIME_HEADER */
#endif /* ZEROSKIP_ONNXRUNTIME_ABI_H */
